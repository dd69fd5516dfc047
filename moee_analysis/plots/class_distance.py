"""How differently classes are routed: every class against every other, and families apart."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style


@style.house
def class_distance(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.class_distance``: a heat map per layer.

    White lines part the families. The diagonal shows two halves of the same class.
    """
    groups = list(table.groupby(["system", "layer"], sort=False))
    several = table["system"].nunique() > 1
    cols = min(3, len(groups))
    side = max(1.3, 0.12 * table["class_a"].nunique())
    size = (side + 0.3 + 1.5 / cols, side + 0.4 + 0.8 * cols / len(groups))
    fig, axes = style.panels(len(groups), cols=cols, size=size)
    top = table["js"].max()
    for place, (ax, ((system, layer), part)) in enumerate(zip(axes, groups, strict=True)):
        matrix, names = drawing.square(part, "js", "class")
        image = drawing.heat_map(ax, matrix, cmap=style.sequential, vmin=0, vmax=top)
        below = place + cols >= len(groups)
        drawing.name_cells(ax, names if place % cols == 0 else (), names if below else ())
        _part_families(ax, part)
        ax.set_title(drawing.panel_title(system, layer, several=several))
    drawing.bar_beside(fig, axes, image, "Jensen-Shannon divergence (bits)")
    return drawing.finish(fig, table, caption)


@style.house
def family_separation(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.family_separation``: how surely, and how far, families part."""
    colours = style.colours(table["system"])
    fig, (left, right) = style.figure(7.0, 2.7, 1, 2)
    for system, part in table.groupby("system", sort=False):
        layers = part.sort_values("layer").set_index("layer")
        colour = colours[system]
        left.plot(layers["auc"], color=colour, marker="o", ms=3.5, label=system)
        left.plot(layers["null_high"], color=colour, lw=1, ls="--")
        right.plot(layers["mean_other"], color=colour, marker="o", ms=3.5)
        right.plot(layers["mean_same"], color=colour, marker="o", ms=3.5, mfc="white")
        right.plot(layers["floor"], color=colour, lw=1, ls=":")
    left.axhline(0.5, color=style.GREY, lw=1)
    left.set(title="same family nearer than another", ylabel="probability (AUC)", ylim=(None, 1.02))
    left.plot([], [], color=style.GREY, lw=1, ls="--", label="permuted families, 95 %")
    right.set(title="mean distance of two classes", ylabel="divergence (bits)")
    right.set_ylim(bottom=0)
    _legend_of_pairs(right)
    for ax in (left, right):
        drawing.whole_layers(ax)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    drawing.legend_above(fig, left)
    return drawing.finish(fig, table, caption)


@style.house
def class_relatedness(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.class_relatedness``: a line per system, chance dashed."""
    colours = style.colours(table["system"])
    fig, ax = style.figure(4.8, 2.9)
    for system, part in table.groupby("system", sort=False):
        layers = part.sort_values("layer").set_index("layer")
        ax.plot(layers["spearman"], color=colours[system], marker="o", ms=3.5, label=system)
        ax.plot(layers["null_high"], color=colours[system], lw=1, ls="--")
    ax.plot([], [], color=style.GREY, lw=1, ls="--", label="permuted classes, 95 %")
    ax.axhline(0, color=style.GREY, lw=0.8)
    ax.set(xlabel=style.LAYER_AXIS, ylabel="rank correlation of routing\nand classifier distance")
    drawing.whole_layers(ax)
    drawing.legend_above(fig, ax, columns=2)
    return drawing.finish(fig, table, caption)


def _part_families(ax: Axes, table: pd.DataFrame) -> None:
    if "family_a" not in table:
        return
    families = table.drop_duplicates("order_a").sort_values("order_a")["family_a"].to_list()
    for place, (one, following) in enumerate(pairwise(families)):
        if one != following:
            ax.axhline(place + 0.5, color="white", lw=1.2)
            ax.axvline(place + 0.5, color="white", lw=1.2)


def _legend_of_pairs(ax: Axes) -> None:
    look = {"color": style.GREY, "ms": 3.5}
    ax.plot([], [], marker="o", label="different families", **look)
    ax.plot([], [], marker="o", mfc="white", label="same family", **look)
    ax.plot([], [], ls=":", lw=1, label="same class, two halves", **look)
    ax.legend()
