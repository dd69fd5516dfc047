"""Whether experts stand for parts of the scene, and which parts are lost without an expert."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm, PowerNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_NULLS = {"class_null_high": "--", "null_high": ":"}
_NULL_NAMES = {
    "masks exchanged within a class, 95 %": {"color": style.GREY, "lw": 1, "ls": "--"},
    "masks exchanged between any images, 95 %": {"color": style.GREY, "lw": 1, "ls": ":"},
}


@style.house
def modularity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.modularity``: a line per system, its chance levels below it."""
    fig, ax = style.figure(5.4, 3.2)
    drawing.curves(ax, table, "ami", band=True, chance=_NULLS)
    ax.axhline(0, **style.REFERENCE)
    ax.set_ylabel("adjusted mutual information\nof expert and part")
    drawing.layer_axis(fig, [ax])
    drawing.legend(fig, ax, _NULL_NAMES, columns=2)
    return drawing.finish(fig, table, caption)


@text.describes(modularity)
def _describe_modularity(table: pd.DataFrame) -> str:
    chance, null = "masks exchanged within a class", "class_null_high"
    words = text.beyond(table, "ami", chance, null=null)
    return f"Adjusted mutual information of expert and part: {words}."


@style.house
def part_profile(table: pd.DataFrame, *, parts: int = 16, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.part_profile``: experts by the most frequent ``parts``, per layer.

    The row on top is all patches; each expert's share of the patches stands beside its number.
    """
    frequent = table.sort_values("share_all", ascending=False, kind="stable")["part"].unique()
    layers = drawing.by_layer(table)
    maps = {
        name: _profiles(rows).reindex(columns=frequent[:parts]) for name, rows in layers.items()
    }
    rows, columns = (max(one.shape[axis] for one in maps.values()) for axis in (0, 1))
    size = (1.3 + 0.15 * columns, 0.9 + 0.14 * max(8, rows))
    norm = PowerNorm(0.5, vmin=0, vmax=table["share"].max())  # shows small shares too
    look = {"cmap": style.SHARES, "norm": norm, "most": max(rows, columns)}
    bar = "share of the expert's patches"
    fig, axes = drawing.heat_maps(maps, bar, cols=3, panel=size, **look)
    for ax in axes:
        ax.axhline(1, color="white", lw=5)
    fig.supylabel("expert (share of patches)")
    return drawing.finish(fig, table, caption)


def _profiles(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of parts (columns) of all patches, then of those of each expert in order."""
    experts = rows.pivot(index="order", columns="part", values="share").fillna(0)
    first = rows.drop_duplicates("order").sort_values("order")
    names = first["expert"].astype(str) + first["size"].map(" ({:.0%})".format)
    everything = rows.drop_duplicates("part").set_index("part")["share_all"]
    return pd.concat([everything.to_frame("all").T, experts.set_axis(names)])


@text.describes(part_profile)
def _describe_part_profile(table: pd.DataFrame) -> str:
    purest = text.largest(table, "share")
    if purest is None:
        return "No expert takes a patch."
    share, everywhere, size = (text.percent(purest[of]) for of in ("share", "share_all", "size"))
    return (
        f"Purest is expert {purest['expert']} of {text.where(purest, table)}: {share} of its "
        f"patches show {purest['part']}, of all patches {everywhere}. It takes {size} of the "
        "patches."
    )


@style.house
def parts_unseen(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.parts_unseen``: change in recall, parts by experts removed.

    A row of panels for each layer; a dot marks a change whose interval leaves out 0.
    """
    layers, systems, parts = (table[name].unique() for name in ("layer", "system", "part"))
    experts = max(12, table.groupby("layer")["expert"].nunique().max())
    width, height = 2 * (0.5 + 0.115 * experts) + 1.6, 0.65 + 0.135 * max(8, len(parts))
    grid = {"rows": len(layers), "cols": len(systems), "squeeze": False, "sharey": True}
    fig, axes = style.figure(width, height * len(layers), **grid)
    norm = CenteredNorm(0, 100 * max(float(table["change"].abs().quantile(0.995)), 0.01))
    named = table["part"] + table["recall_intact"].map(" ({:.0%})".format)
    cells = drawing.in_percent(table.assign(part=named), "change").groupby(["layer", "system"])
    for ax, panel in zip(axes.flat, product(layers, systems), strict=True):
        values = cells.get_group(panel).pivot(index="part", columns="expert")
        values = values.reindex(named.unique())
        look = {"cmap": "RdBu", "norm": norm, "yticklabels": True, "most": 14}
        mesh = drawing.heat_map(ax, values["change"], **look)
        row, column = np.nonzero(((values["low"] > 0) | (values["high"] < 0)).to_numpy())
        ax.plot(column + 0.5, row + 0.5, "o", ms=2.4, color=style.INK, mec="white", mew=0.5)
        ax.set_title("layer {}, {}".format(*panel))
    fig.supxlabel("expert removed, or replaced by as many random patches")
    fig.supylabel("part (recall of the intact model)")
    drawing.bar_beside(fig, list(axes.flat), mesh, "change in recall (percentage points)")
    return drawing.finish(fig, table, caption)


@text.describes(parts_unseen)
def _describe_parts_unseen(table: pd.DataFrame) -> str:
    clear = text.of_each(
        table,
        lambda rows: f"in {(rows['high'] < 0).sum()} of {len(rows)} pairs of knock-out and part",
    )
    worst = text.smallest(table[table["system"] == "expert"], "change")
    if worst is None:
        return f"Recall of parts falls clearly: {clear}."
    return (
        f"Recall of a part falls clearly: {clear}. Most in layer {worst['layer']} without expert "
        f"{worst['expert']}: {worst['part']} from {text.percent(worst['recall_intact'])} by "
        f"{text.points(worst['change'])} percentage points."
    )
