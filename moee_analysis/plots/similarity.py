"""How alike the mean inputs of experts are: heat maps, and their course over the layers."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style

_KINDS = {"cosine": "raw", "cosine_centred": "centred"}


@style.house
def similarity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.similarity``: raw and centred cosines of a layer side by side.

    Experts stand in the same order in both, like ones together.
    """
    groups = list(table.groupby(["system", "layer"], sort=False))
    several = table["system"].nunique() > 1
    fig, axes = style.panels(2 * len(groups), cols=4, size=(2.0, 2.15))
    pairs = [(group, kind) for group in groups for kind in _KINDS]
    for ax, (((system, layer), part), kind) in zip(axes, pairs, strict=True):
        matrix, names = drawing.square(part, kind, "expert")
        image = drawing.heat_map(ax, matrix, cmap=style.diverging, vmin=-1, vmax=1)
        shown = drawing.thinned(names)
        drawing.name_cells(ax, shown, shown, size=6)
        label = f"{style.layer_label(layer)}, {_KINDS[kind]}"
        ax.set_title(f"{system}\n{label}" if several else label)
    drawing.bar_beside(fig, axes, image, "cosine of mean inputs")
    return drawing.finish(fig, table, caption)


@style.house
def similarity_summary(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.similarity_summary``: cosines and common mean over the layers."""
    systems = list(dict.fromkeys(table["system"]))
    fig, axes = style.figure(6.6, 2.5 * len(systems), len(systems), 2, squeeze=False, sharex=True)
    for (left, right), system in zip(axes, systems, strict=True):
        layers = table[table["system"] == system].sort_values("layer")
        _draw_cosines(left, layers)
        _draw_shares(right, layers)
        left.set_title(f"{system}: pairs of experts" if len(systems) > 1 else "pairs of experts")
    for ax in axes.flat:
        drawing.whole_layers(ax)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    return drawing.finish(fig, table, caption)


def _draw_cosines(ax: Axes, layers: pd.DataFrame) -> None:
    x = layers["layer"]
    for prefix, name, colour, aside in (
        ("", "raw", style.PALETTE[1], -0.1),
        ("centred_", "centred", style.PALETTE[0], 0.1),
    ):
        low, mean, high = (layers[f"{prefix}{what}"] for what in ("min", "mean", "max"))
        ax.vlines(x + aside, low, high, color=colour, lw=1, alpha=0.6)
        ax.plot(x + aside, mean, color=colour, marker="o", ms=3.5, label=f"{name}: mean, range")
    ax.plot(x, layers["centred_expected"], color=style.INK, lw=1, ls=":", label="−1 / (k − 1)")
    ax.set(ylabel="cosine", ylim=(-1.02, 1.02))
    ax.legend(fontsize=7, loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")


def _draw_shares(ax: Axes, layers: pd.DataFrame) -> None:
    x = layers["layer"]
    look = {"marker": "o", "ms": 3.5}
    ax.plot(
        x, layers["common_mean"], color=style.PALETTE[2], label="‖mean‖² / mean ‖centre‖²", **look
    )
    raw, centred = style.PALETTE[1], style.PALETTE[0]
    ax.plot(x, layers["near_orthogonal"], color=raw, label="raw pairs, |cos| < 0.2", **look)
    ax.plot(
        x, layers["centred_near_orthogonal"], color=centred, label="centred pairs, |cos| < 0.2",
        **look,
    )  # fmt: skip
    ax.set(ylabel="share", ylim=(-0.02, 1.02), title="common mean, near-orthogonal")
    ax.legend(fontsize=7)
