"""What is lost once an expert is knocked out: by all images, by classes, and by whom most."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style

_TITLES = {"removed": "one expert removed", "alone": "one expert alone"}
_LOOKS = {
    "expert": {"color": style.PALETTE[0], "mfc": style.PALETTE[0]},
    "random tokens": {"color": style.PALETTE[1], "mfc": "white"},
    "beyond random tokens": {"color": style.PALETTE[2], "mfc": style.PALETTE[2]},
}
_NAMES = {"random tokens": "as many random tokens"}


@style.house
def knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.knock_out``: top-1 over all images, layer by layer.

    A dot is an expert, a hollow one beside it its control; the lines are the model with all its
    experts, and the dense one.
    """
    rows = table[table["kind"] == "all"]
    fig, axes = style.figure(7.4, 2.9, 1, 2)
    for ax, (what, title) in zip(axes, _TITLES.items(), strict=True):
        part = rows[rows["what"] == what]
        for system, side in (("expert", -0.17), ("random tokens", 0.17)):
            _dots(ax, part[part["system"] == system], side, _LOOKS[system])
        for column, dashes, label in (
            ("top1_dense", "--", "dense"),
            ("top1_intact", "-", "intact"),
        ):
            ax.axhline(100 * rows[column].iloc[0], color=style.GREY, ls=dashes, lw=1, label=label)
        ax.set(title=title, ylabel="top-1 (%)" if what == "removed" else None)
        drawing.whole_layers(ax)
    for system in ("expert", "random tokens"):
        axes[0].plot([], [], ls="", marker="o", ms=3, label=_label(system), **_LOOKS[system])
    fig.supxlabel(style.LAYER_AXIS, size=9)
    drawing.legend_above(fig, axes[0])
    return drawing.finish(fig, table, caption)


@style.house
def class_knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.knock_out``: a heat map of classes by experts for each layer.

    Colour is what removing the expert adds to the log-probability of the class; experts are in
    order of their share of tokens, classes in that of their families, parted by lines. Each layer
    has a scale of its own.
    """
    rows = table[(table["kind"] == "class") & (table["what"] == "removed")]
    rows = rows[rows["system"] == "expert"]
    shown = list(dict.fromkeys(rows["layer"]))
    classes = rows.drop_duplicates("group").sort_values("family", kind="stable")
    experts = rows.groupby("layer")["expert"].nunique().max()
    size = (1.4 + 1.0 / len(shown) + 0.12 * experts, 0.75 + 0.14 * len(classes))
    fig, axes = style.panels(len(shown), cols=2, size=size)
    for place, (ax, layer) in enumerate(zip(axes, shown, strict=True)):
        matrix, numbers = _by_share(rows[rows["layer"] == layer], list(classes["group"]))
        norm = _around_zero(matrix)
        image = drawing.heat_map(ax, matrix, cmap="RdBu", norm=norm, aspect="auto")
        drawing.bar_beside(fig, [ax], image, "change of log-probability (nats)")
        names = [name.replace("_", " ") for name in classes["group"]]
        drawing.name_cells(ax, names if place % 2 == 0 else (), numbers, size=6)
        _part_families(ax, list(classes["family"]))
        ax.set_title(style.layer_label(layer))
    fig.supxlabel("expert removed, the one with the most tokens first", size=9)
    return drawing.finish(fig, table, caption)


@style.house
def use_and_need(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.use_and_need``: rank correlations, and how often the top agrees.

    Dashed is what permuted classes reach (95 %).
    """
    fig, (left, right) = style.figure(7.4, 2.8, 1, 2)
    for system, part in table.groupby("system", sort=False):
        layers, look = part.sort_values("layer").set_index("layer"), _LOOKS[system]
        for ax, value in ((left, "spearman"), (right, "top_match")):
            ax.plot(layers[value], marker="o", ms=3.5, label=_label(system), **look)
        for ax, high in ((left, "null_high"), (right, "top_match_null_high")):
            ax.plot(layers[high], color=look["color"], ls="--", lw=0.8)
    left.plot([], [], color=style.GREY, ls="--", lw=0.8, label="permuted classes, 95 %")
    left.axhline(0, color=style.GREY, lw=0.8)
    left.set(title="use and need of an expert", ylabel="rank correlation over\nclasses and experts")
    right.set(title="most over-used is most needed", ylabel="share of classes")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        drawing.whole_layers(ax)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    drawing.legend_above(fig, left)
    return drawing.finish(fig, table, caption)


def _dots(ax: Axes, rows: pd.DataFrame, side: float, look: dict[str, str]) -> None:
    """A column of dots for every layer, a little to one side."""
    ax.plot(rows["layer"] + side, 100 * rows["top1"], ls="", marker="o", ms=2.6, mew=0.6, **look)


def _label(system: str) -> str:
    return _NAMES.get(system, system)


def _around_zero(values: np.ndarray) -> TwoSlopeNorm:
    """Colours to the 99th percentile of the size; one cell further out hides no others."""
    top = float(np.quantile(np.abs(values), 0.99)) or 1.0
    return TwoSlopeNorm(0, vmin=-top, vmax=top)


def _by_share(rows: pd.DataFrame, classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Changes (classes, experts), and the experts' numbers, both by their share of tokens."""
    shares = rows.pivot(index="expert", columns="group", values="knocked_out").sum(axis=1)
    order = shares.sort_values(ascending=False, kind="stable")
    changes = rows.pivot(index="group", columns="expert", values="logp_change")
    return changes.loc[classes, order.index].to_numpy(), [str(expert) for expert in order.index]


def _part_families(ax: Axes, families: list[str]) -> None:
    for place, (one, following) in enumerate(pairwise(families)):
        if one != following:
            ax.axhline(place + 0.5, color=style.INK, lw=0.5)
