"""How experts are used and needed: shares, regret of routers, what is lost without an expert."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_METRICS = {
    "gini": ("Gini coefficient", "Gini coefficient", "0 is even"),
    "entropy": ("normalised entropy H / ln E", "Normalised entropy", "1 is even"),
    "max_over_mean": ("largest / mean share", "Largest over mean share", "1 is even"),
    "cv2": ("CV² of the shares", "Squared coefficient of variation", "0 is even"),
    "dead": ("experts never used", "Experts never used", ""),
}
_SHARE = "% of the output's\nvariance"
_WHAT = {"removed": "one expert removed", "alone": "one expert alone"}
_CONTROL = "random tokens"
_NAMES = {"expert": "expert", _CONTROL: "as many random tokens"}
_LOOKS = {
    "expert": {"color": style.PALETTE[0], "marker": "o"},
    _NAMES[_CONTROL]: {"color": style.PALETTE[1], "marker": "o", "mfc": "white"},
    "beyond random tokens": {"color": style.PALETTE[2], "marker": "D"},
}


def _tell_routing(rows: pd.DataFrame) -> str:
    first = rows[rows["rank"] == 0]
    return text.course(first.assign(times=first["share"] * first["n_experts"]), "times")


@drawing.plot(_tell_routing, "The most used expert of a layer takes so many times an even share")
def routing(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.routing``: shares of the experts by use, a panel per layer.

    Steps of E experts have width 1 / E and height E times the share: every area is 1.
    """
    layers, colours = sorted(table["layer"].unique()), style.colours(table["system"])
    opacity = 0.12 if len(colours) == 1 else 0.0  # overlapping areas would only mix
    fig, axes = style.panels(len(layers), size=(2.0, 1.7), sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        ax.axhline(1, **style.REFERENCE)
        for system, rows in table[table["layer"] == layer].groupby("system", sort=False):
            shares = rows.sort_values("rank")["share"].to_numpy()
            steps = (len(shares) * shares, np.linspace(0, 1, len(shares) + 1))
            ax.stairs(*steps, color=colours[system], lw=1.5, label=system, zorder=3)
            ax.stairs(*steps, color=colours[system], fill=True, alpha=opacity, zorder=2)
        ax.set(title=f"layer {layer}", xlim=(0, 1))
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axes[0].set_ylim(bottom=0)
    labels = {"x": "experts, most used first (rank / E)", "y": "share × E (1 is even)"}
    return _finish(fig, axes[0], table, caption, **labels)


def _finish(
    fig: Figure, ax: Axes, table: pd.DataFrame, caption: str | None, bands: str = "", **shared: Any
) -> Figure:
    systems = table.groupby("system", sort=False)
    counts = [
        f"{name}: {text.span(rows['n_experts'], str)} experts, k = {text.span(rows['k'], str)}"
        for name, rows in systems
    ]
    facts = f"{table['n_images'].max()} images{bands}. {'; '.join(counts)}."
    named = [ax] if len(systems) > 1 else []  # the caption names a single one
    return drawing.finish(fig, table, caption or facts, *named, **shared)


def _tell_balance(table: pd.DataFrame) -> str:
    metric = next(name for name in _METRICS if name in set(table["metric"]))
    _, name, even = _METRICS[metric]
    rows = table[table["metric"] == metric]
    words = text.of_each(rows, lambda rows: text.course(rows, "value"))
    return f"{name}{f' ({even})' if even else ''} over the layers: {words}."


@drawing.plot(_tell_balance)
def balance(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.balance``: a panel per metric, lines with 95 % intervals."""
    metrics, looks = table["metric"].unique(), style.looks(table["system"])
    band = bool(table["low"].notna().any())
    fig, axes = style.panels(len(metrics), cols=3, size=(2.6, 2.0), sharex=True)
    for ax, metric in zip(axes, metrics, strict=True):
        drawing.curves(ax, table[table["metric"] == metric], "value", looks=looks, band=band)
        title, _, even = _METRICS[metric]
        ax.set_title(f"{title}\n({even})" if even else title)
        low, high = ax.get_ylim()  # every metric from its own zero or one
        if metric == "entropy":
            ax.set_ylim(low, 1 + 0.03 * (1 - low))
        else:
            ax.set_ylim(0, max(1.0, high) if metric in ("dead", "max_over_mean") else high)
        ax.yaxis.get_major_locator().set_params(integer=metric == "dead")  # whole experts
    bands = "; bands are basic 95 % intervals of the image bootstrap" if band else ""
    return _finish(fig, axes[0], table, caption, bands, layers=axes)


def _tell_router_regret(rows: pd.DataFrame) -> str:
    return (
        f"{text.span(rows['error'], text.percent)} (regret "
        f"{text.span(rows['regret'], text.percent)}, best expert for "
        f"{text.span(rows['best'], text.percent)} of the tokens)"
    )


@drawing.plot(
    _tell_router_regret,
    "Squared error of the output over its variance, by router, over the layers",
    by="router",
)
def router_regret(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.router_regret``: a line for every router over the layers."""
    fig, (left, right) = style.figure(7.2, 2.7, 1, 2)
    drawing.curves(left, drawing.in_percent(table, "error"), "error", by="router")
    left.set(yscale="log", title="squared error of the output", ylabel=_SHARE)
    drawing.plain_log(left.yaxis, subs=(1, 3))
    draw_regret(right, table)
    right.set(title="regret: error beyond the best expert's", ylabel="")
    return drawing.finish(fig, table, caption, left, layers=(left, right), columns=5)


def draw_regret(ax: Axes, table: pd.DataFrame) -> None:
    """Draw the regret of every router that has any; the best one possible has none."""
    some = table.groupby("router")["regret"].transform("max") > 0
    regret, looks = drawing.in_percent(table[some], "regret"), style.looks(table["router"])
    drawing.curves(ax, regret, "regret", by="router", looks=looks)
    ax.set(yscale="log", title="regret of the routers", xlabel="layer", ylabel=_SHARE)
    drawing.plain_log(ax.yaxis, subs=(1, 3))
    drawing.whole_ticks(ax)


def _tell_knock_out(table: pd.DataFrame) -> str:
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


@drawing.plot(_tell_knock_out)
def knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.knock_out``: top-1 over all images by expert and control."""
    rows = drawing.in_percent(table[table["kind"] == "all"], "top1", "top1_dense", "top1_intact")
    fig, axes = style.figure(7.4, 2.9, 1, 2)
    for ax, (what, title) in zip(axes, _WHAT.items(), strict=True):
        for (system, name), aside in zip(_NAMES.items(), (-0.17, 0.17), strict=True):
            dots = rows[(rows["what"] == what) & (rows["system"] == system)]
            ax.plot(dots["layer"] + aside, dots["top1"], ls="", ms=2.6, mew=0.6, **_LOOKS[name])
        for model, dashes in (("dense", "--"), ("intact", "-")):
            ax.axhline(rows[f"top1_{model}"].iloc[0], ls=dashes, label=model, **style.REFERENCE)
        ax.set_title(title)
    axes[0].set_ylabel("top-1 (%)")
    dots = {name: _LOOKS[name] | {"ls": ""} for name in _NAMES.values()}
    return drawing.finish(fig, table, caption, axes[0], dots, layers=axes)


def _tell_class_knock_out(table: pd.DataFrame) -> str:
    known = _of_classes(table).dropna(subset="logp_change", ignore_index=True)
    worst = known.loc[known.groupby("layer")["logp_change"].idxmin()]
    words = [
        f"{text.number(row.logp_change)} for {row.group} without expert {row.expert} of layer "
        f"{row.layer}"
        for row in worst.itertuples()
    ]
    return f"The log-probability of a class falls most, in nats: {'; '.join(words) or 'unknown'}."


@drawing.plot(_tell_class_knock_out)
def class_knock_out(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.knock_out``: change of log-probability, classes (by families) by experts."""
    rows = _of_classes(table)
    classes = rows.drop_duplicates("group").sort_values("family", kind="stable")
    layers = rows.groupby("layer", sort=False)
    experts = max(8, layers["expert"].nunique().max())
    size = (1.4 + 1.0 / len(layers) + 0.12 * experts, 0.75 + 0.14 * max(12, len(classes)))
    fig, axes = style.panels(len(layers), cols=2, size=size)
    for place, (ax, (layer, own)) in enumerate(zip(axes, layers, strict=True)):
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
    return table.query("kind == 'class' and what == 'removed' and system == 'expert'")


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


def _tell_parts_unseen(table: pd.DataFrame) -> str:
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


@drawing.plot(_tell_parts_unseen)
def parts_unseen(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.parts_unseen``: change in recall; dots where the interval leaves out 0."""
    named = table["part"] + table["recall_intact"].map(" ({:.0%})".format)
    cells = drawing.in_percent(table.assign(part=named), "change").groupby(["layer", "system"])
    experts = max(12, table.groupby("layer")["expert"].nunique().max())
    size = (1.3 + 0.115 * experts, 0.65 + 0.135 * max(8, named.nunique()))
    fig, axes = style.panels(len(cells), cols=table["system"].nunique(), size=size, sharey=True)
    norm = CenteredNorm(0, 100 * max(float(table["change"].abs().quantile(0.995)), 0.01))
    look = {"cmap": "RdBu", "norm": norm, "yticklabels": True, "most": 14}
    for ax, (panel, rows) in zip(axes, cells, strict=True):
        values = rows.pivot(index="part", columns="expert").reindex(named.unique())
        mesh = drawing.heat_map(ax, values["change"], **look)
        row, column = np.nonzero(((values["low"] > 0) | (values["high"] < 0)).to_numpy())
        ax.plot(column + 0.5, row + 0.5, "o", ms=2.4, color=style.INK, mec="white", mew=0.5)
        ax.set_title("layer {}, {}".format(*panel))
    drawing.bar_beside(fig, axes, mesh, "change in recall (percentage points)")
    removed = "expert removed, or replaced by as many random patches"
    part = "part (recall of the intact model)"
    return drawing.finish(fig, table, caption, x=removed, y=part)


_QUANTITIES = {  # of measure.merging: its panel, and how the sentence says it
    "tokens": ("tokens left of the patches", ""),
    "alone": ("patches alone in a token (%)", ""),
    "largest": ("patches in the largest token", ""),
    "part": ("pairs of the same part (%)", "show the same part"),
    "expert": ("pairs of the same expert (%)", "would go to the same expert"),
    "distance": ("distance of pairs (patches)", ""),
}
_PAIRS = {
    "merged": {"color": style.PALETTE[0], "marker": "o"},
    "random": {"color": style.PALETTE[1], "marker": "s"},
    "neighbours": {"color": style.PALETTE[2], "marker": "D"},
}


def _tell_merging(table: pd.DataFrame) -> str:
    mean = table[table["layer"] == table["layer"].max()].groupby(["quantity", "pairs"])["value"]
    last = mean.mean().to_dict()
    first = (
        f"After layer {table['layer'].max()} {text.number(last.get(('tokens', 'merged')), 1)} "
        f"tokens are left of the patches, {text.percent(last.get(('alone', 'merged')))} of which "
        f"stand alone (by chance {text.percent(last.get(('alone', 'random')))})."
    )
    averages = table.groupby(["quantity", "pairs"])["value"].mean().to_dict()
    shared = [
        f"{text.percent(averages[quantity, 'merged'])} {words} (random pairs "
        f"{text.percent(averages.get((quantity, 'random')))}, neighbours "
        f"{text.percent(averages.get((quantity, 'neighbours')))})"
        for quantity, (_, words) in _QUANTITIES.items()
        if words and (quantity, "merged") in averages
    ]
    return f"{first} Of merged pairs, over the layers, {text.listed(shared)}." if shared else first


@drawing.plot(_tell_merging)
def merging(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.merging``: a panel for each quantity over the layers, with its intervals."""
    shown = [name for name in _QUANTITIES if name in set(table["quantity"])]
    fig, axes = style.panels(len(shown), cols=3, size=(2.6, 1.9), sharex=True)
    for ax, quantity in zip(axes, shown, strict=True):
        rows = table[table["quantity"] == quantity]
        if "%" in _QUANTITIES[quantity][0]:
            rows = drawing.in_percent(rows, "value", "low", "high")
        drawing.curves(ax, rows, "value", by="pairs", looks=_PAIRS, band=True)
        ax.set(title=_QUANTITIES[quantity][0], ylim=(0, None))
    return drawing.finish(fig, table, caption, _PAIRS, layers=axes)
