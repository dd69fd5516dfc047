"""What is lost once an expert is knocked out: by all images, by classes, and of which parts."""

import math
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_WHAT = {"removed": "one expert removed", "alone": "one expert alone"}
_CONTROL = "random tokens"
_NAMES = {"expert": "expert", _CONTROL: "as many random tokens"}
_LOOKS = {
    "expert": {"color": style.PALETTE[0], "marker": "o"},
    _NAMES[_CONTROL]: {"color": style.PALETTE[1], "marker": "o", "mfc": "white"},
    "beyond random tokens": {"color": style.PALETTE[2], "marker": "D"},
}


def _describe_knock_out(table: pd.DataFrame) -> str:
    rows = table[table["kind"] == "all"]
    intact, dense = (text.percent(rows[f"top1_{model}"].iloc[0]) for model in ("intact", "dense"))
    means = rows.groupby(["what", "system"])["change"].mean()
    changes = text.listed(
        f"{text.points(means.get((what, 'expert'), math.nan))} percentage points with {words} "
        f"({text.points(means.get((what, _CONTROL), math.nan))} with as many random tokens)"
        for what, words in _WHAT.items()
    )
    first = f"Top-1 of {intact} intact (dense: {dense}) changes on average by {changes}."
    removed = rows[(rows["what"] == "removed") & (rows["system"] == "expert")]
    worst = text.smallest(removed, "change")
    if worst is None:
        return first
    return (
        f"{first} Most is lost without expert {worst['expert']} of layer {worst['layer']}: "
        f"{text.points(worst['change'])} percentage points."
    )


@drawing.plot(_describe_knock_out)
def knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.knock_out``: top-1 over all images by expert and control."""
    rows = drawing.in_percent(table[table["kind"] == "all"], "top1", "top1_dense", "top1_intact")
    fig, axes = style.figure(7.4, 2.9, 1, 2)
    for ax, (what, title) in zip(axes, _WHAT.items(), strict=True):
        for (system, name), aside in zip(_NAMES.items(), (-0.17, 0.17), strict=True):
            dots = rows[(rows["what"] == what) & (rows["system"] == system)]
            ax.plot(dots["layer"] + aside, dots["top1"], ls="", ms=2.6, mew=0.6, **_LOOKS[name])
        for model, dashes in (("dense", "--"), ("intact", "-")):
            look = style.REFERENCE | {"ls": dashes, "label": model}
            ax.axhline(rows[f"top1_{model}"].iloc[0], **look)
        ax.set_title(title)
    axes[0].set_ylabel("top-1 (%)")
    dots = {name: _LOOKS[name] | {"ls": ""} for name in _NAMES.values()}
    return drawing.finish(fig, table, caption, axes[0], dots, layers=axes)


def _describe_class_knock_out(table: pd.DataFrame) -> str:
    words = []
    for layer, rows in _of_classes(table).groupby("layer"):
        worst = text.smallest(rows, "logp_change")
        if worst is None:
            words.append(f"unknown in layer {layer}")
        else:
            change = f"{text.number(worst['logp_change'])} for {worst['group']}"
            words.append(f"{change} without expert {worst['expert']} of layer {layer}")
    return f"The log-probability of a class falls most, in nats: {'; '.join(words)}."


@drawing.plot(_describe_class_knock_out)
def class_knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.knock_out``: change of log-probability, classes (by families) by experts."""
    rows = _of_classes(table)
    layers, classes = rows["layer"].unique(), rows.drop_duplicates("group")
    classes = classes.sort_values("family", kind="stable")
    experts = max(8, rows.groupby("layer")["expert"].nunique().max())
    size = (1.4 + 1.0 / len(layers) + 0.12 * experts, 0.75 + 0.14 * max(12, len(classes)))
    fig, axes = style.panels(len(layers), cols=2, size=size)
    for place, (ax, layer) in enumerate(zip(axes, layers, strict=True)):
        own = rows[rows["layer"] == layer]
        shares = own.groupby("expert")["knocked_out"].sum()
        order = shares.sort_values(ascending=False, kind="stable").index
        changes = own.pivot(index="group", columns="expert", values="logp_change")
        changes = changes.loc[classes["group"], order]
        changes.index = changes.index.str.replace("_", " ")
        # colours end at the 99th percentile: one cell further out hides no others
        norm = CenteredNorm(0, float(changes.abs().stack().quantile(0.99)) or 1.0)
        names = {"yticklabels": place % 2 == 0, "xticklabels": True, "size": 6}
        mesh = drawing.heat_map(ax, changes, cmap="RdBu", norm=norm, **names)
        drawing.bar_beside(fig, [ax], mesh, "change of log-probability (nats)")
        drawing.part_groups(classes["family"], ax.axhline, color=style.INK, lw=0.5)
        ax.set_title(f"layer {layer}")
    order = "expert removed, the one with the most tokens first"
    return drawing.finish(fig, table, caption, x=order)


def _of_classes(table: pd.DataFrame) -> pd.DataFrame:
    removed = (table["kind"] == "class") & (table["what"] == "removed")
    return table[removed & (table["system"] == "expert")]


@drawing.plot(
    text.beyond("spearman", "permuted classes"),
    "Rank correlation of use and need over classes and experts",
)
def use_and_need(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.use_and_need``: rank correlations, and how often the top agrees."""
    fig, (left, right) = style.figure(7.4, 2.8, 1, 2)
    named, chance = table.replace({"system": _NAMES}), "permuted classes, 95 %"
    drawing.curves(left, named, "spearman", looks=_LOOKS, chance={"null_high": chance})
    null = {"top_match_null_high": chance}
    drawing.curves(right, named, "top_match", looks=_LOOKS, chance=null)
    left.axhline(0, **style.REFERENCE)
    left.set(title="use and need of an expert", ylabel="rank correlation over\nclasses and experts")
    right.set(title="most over-used is most needed", ylabel="share of classes", ylim=(0, None))
    return drawing.finish(fig, table, caption, left, layers=(left, right))


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


@drawing.plot(_describe_parts_unseen)
def parts_unseen(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.parts_unseen``: change in recall; dots where the interval leaves out 0."""
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
    drawing.bar_beside(fig, list(axes.flat), mesh, "change in recall (percentage points)")
    removed = "expert removed, or replaced by as many random patches"
    part = "part (recall of the intact model)"
    return drawing.finish(fig, table, caption, x=removed, y=part)
