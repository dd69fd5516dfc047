"""Whether experts stand for parts of the scene: the course over layers, and each expert's parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style

_NULLS = {
    "class_null_high": ("masks exchanged within a class, 95 %", "--"),
    "null_high": ("masks exchanged between any images, 95 %", ":"),
}


@style.house
def modularity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.modularity``: a line per system, its chance levels below it."""
    colours = style.colours(table["system"])
    fig, ax = style.figure(5.4, 3.2)
    for system, part in table.groupby("system", sort=False):
        drawing.line(ax, part, "ami", color=colours[system], label=system)
        layers = part.sort_values("layer")
        for null, (_, dashes) in _NULLS.items():
            ax.plot(layers["layer"], layers[null], color=colours[system], ls=dashes, lw=1)
    for name, dashes in _NULLS.values():
        ax.plot([], [], color=style.GREY, ls=dashes, lw=1, label=name)
    ax.axhline(0, color=style.GREY, lw=0.8)
    ax.set(xlabel=style.LAYER_AXIS, ylabel="adjusted mutual information\nof expert and part")
    drawing.whole_layers(ax)
    drawing.legend_above(fig, ax, columns=2)
    return drawing.finish(fig, table, caption)


@style.house
def part_profile(table: pd.DataFrame, *, parts: int = 16, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.part_profile``: a heat map of experts by parts per layer.

    The most frequent ``parts`` are shown, most frequent first. The row on top is all patches;
    each expert's share of the patches stands beside its number.
    """
    groups = list(table.groupby(["system", "layer"], sort=False))
    several = table["system"].nunique() > 1
    shown = _most_frequent(table, parts)
    rows = max(part["expert"].nunique() for _, part in groups)
    size = (1.3 + 0.15 * len(shown), 0.9 + 0.14 * (rows + 1))
    fig, axes = style.panels(len(groups), cols=3, size=size)
    norm = PowerNorm(0.5, vmin=0, vmax=table["share"].max())  # shows small shares too
    for ax, ((system, layer), part) in zip(axes, groups, strict=True):
        matrix, names = _profiles(part, shown)
        image = drawing.heat_map(ax, matrix, cmap=drawing.WHITE_TO_BLUE, norm=norm, aspect="auto")
        drawing.name_cells(ax, names, shown)
        ax.axhline(0.5, color="white", lw=5)
        ax.set_title(drawing.panel_title(system, layer, several=several))
    fig.supylabel("expert (share of patches)", size=9)
    drawing.bar_beside(fig, axes, image, "share of the expert's patches")
    return drawing.finish(fig, table, caption)


def _most_frequent(table: pd.DataFrame, count: int) -> list[str]:
    frequent = table.sort_values("share_all", ascending=False, kind="stable")
    return list(dict.fromkeys(frequent["part"]))[:count]


def _profiles(part: pd.DataFrame, shown: list[str]) -> tuple[np.ndarray, list[str]]:
    """All patches on top, and the experts below in order."""
    experts = part.pivot(index="order", columns="part", values="share").reindex(columns=shown)
    everything = part.drop_duplicates("part").set_index("part")["share_all"].reindex(shown)
    first = part.drop_duplicates("order").sort_values("order")
    names = [f"{e} ({s:.0%})" for e, s in zip(first["expert"], first["size"], strict=True)]
    return np.vstack([everything, experts.fillna(0)]), ["all", *names]
