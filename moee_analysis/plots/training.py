"""How models learn: what fine-tuning gives back, and which start beats which."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_LINE = {"lw": 1.4, "ms": 5, "mew": 1.2}
_STAGES = {"before": {"ls": "--", "mfc": "white"}, "after": {"ls": "-"}}
_RING = {"ls": "", "marker": "o", "ms": 9, "mfc": "none", "mew": 1.2}
_BESIDE = 0.3  # points of MACs from a mean to its seeds
_APART = 0.8  # points of MACs between the first and the last line, so that intervals show
_CONTRIBUTIONS = {
    "contribution": "length added",
    "relative": "over length of whole output",
    "mass": "share of combine weights",
}


def _tell_fine_tuning(table: pd.DataFrame) -> str:
    saved = table.groupby("budget")["macs_reduction"].mean().dropna()
    if saved.empty:
        return "No saving is known."
    means = table[table["budget"] == saved.idxmax()].drop_duplicates(["system", "stage"])
    means = means.assign(kept=means["mean"].map(text.percent) + " " + means["stage"])
    kept = text.of_each(means, lambda rows: text.listed(rows["kept"]))
    return f"Kept of the dense top-1 at {text.percent(saved.max())} fewer MACs: {kept}."


@drawing.plot(_tell_fine_tuning)
def fine_tuning(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.fine_tuning``: retention by MACs saved; small dots are single seeds."""
    fig, ax = style.figure(6.2, 3.4)
    looks = style.looks(table["system"])
    shares = drawing.in_percent(table, "retention", "mean", "low", "high", "macs_reduction")
    lines = shares.groupby(["system", "stage"], sort=False)
    places = np.linspace(-_APART / 2, _APART / 2, len(lines))
    for place, ((system, stage), rows) in zip(places, lines, strict=True):
        look = looks[system] | _STAGES[stage]
        x = rows["macs_reduction"].groupby(rows["budget"]).transform("mean") + place
        if rows["seed"].nunique() > 1:
            ax.plot(x + _BESIDE, rows["retention"], ".", ms=3.5, color=look["color"])
        means = rows.assign(x=x).drop_duplicates("budget").sort_values("x")
        ax.vlines(means["x"], means["low"], means["high"], color=look["color"], **style.INTERVAL)
        ax.plot(means["x"], means["mean"], zorder=4, **_LINE | look)
    ax.axhline(100, **style.REFERENCE)
    middle, half = np.mean(ax.get_xlim()), np.ptp(ax.get_xlim()) / 2
    ax.set_xlim(middle - max(half, 5), middle + max(half, 5))  # a single budget is no axis
    ax.set_xlabel("MACs saved (%; lines set a little apart)")
    ax.set_ylabel("top-1 retained (% of the dense model's)")
    for stage, look in _STAGES.items():
        looks[f"{stage} fine-tuning"] = {"color": style.INK, "marker": "o"} | look
    marks = {name: _LINE | look for name, look in looks.items()} | {"dense model": style.REFERENCE}
    return drawing.finish(fig, table, caption, marks, columns=1, loc="outside right center")


def _tell_history(table: pd.DataFrame) -> str:
    named, words = table if "system" in table else table.assign(system="On images held out"), []
    for system, rows in named.dropna(subset="kl").groupby("system", sort=False):
        first, lowest = rows.iloc[0], text.smallest(rows, "kl")
        words.append(
            f"{system} the divergence from the dense model goes from {text.bits(first['kl'])} to "
            f"{text.bits(lowest['kl'])} nats, its lowest, after epoch {lowest['epoch']:.0f}, and "
            f"the agreement with its predictions from {text.percent(first['agreement'])} to "
            f"{text.percent(lowest['agreement'])}"
        )
    return f"{'; '.join(words) or 'No divergence is known'}."


@drawing.plot(_tell_history)
def history(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw the divergence from the dense model and the agreement with it over the epochs.

    ``table`` has a row per ``epoch``, from 0: ``loss`` (nan at 0), ``kl`` (nats), ``agreement``
    (a share), and may name the ``system``. A ring marks the lowest divergence, whose weights are
    kept; dotted is what there was before any training.
    """
    named = table if "system" in table else table.assign(system="on images held out")
    named, colours = drawing.in_percent(named, "agreement"), style.colours(named["system"])
    fig, (left, right) = style.figure(6.4, 2.7, 1, 2)
    for ax, value in ((left, "kl"), (right, "agreement")):
        drawing.curves(ax, named, value, x="epoch")
        for system, rows in named.groupby("system", sort=False):
            lowest = rows.loc[[rows["kl"].idxmin()]]
            ax.plot(lowest["epoch"], lowest[value], mec=colours[system], **_RING)
            ax.axhline(rows[value].iloc[0], color=colours[system], lw=0.9, ls=":")
        ax.set_xlabel("epoch (0: before fine-tuning)")
        drawing.whole_ticks(ax)
    if len(colours) == 1:
        loss = named.set_index("epoch")["loss"].dropna()
        left.plot(loss, color=style.GREY, marker=".", label="training loss")
    left.set(ylabel="KL(dense || model) (nats)", title="divergence from the dense model")
    left.set_ylim(bottom=0)
    right.set(ylabel="same prediction (% of images)", title="agreement with the dense model")
    left.legend()
    return drawing.finish(fig, table, caption)


def _tell_learning_curves(table: pd.DataFrame) -> str:
    last = table["images"].max()
    ends = table[table["images"] == last].drop_duplicates("start")
    return f"After {last:.0f} training images top-1 is {_ends(ends, 'mean')}."


@drawing.plot(_tell_learning_curves)
def learning_curves(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.learning_curves``: means of the seeds with intervals."""
    fig, ax = style.figure(7.0, 3.4)
    means = drawing.in_percent(table.drop_duplicates(["start", "images"]), "mean", "low", "high")
    drawing.curves(ax, means, "mean", x="images", by="start", band=True)
    ax.set(xlabel="training images seen", ylabel="top-1 (%)", ylim=(0, None))
    return drawing.finish(fig, table, caption, ax, columns=1, loc="outside right center")


def _ends(table: pd.DataFrame, value: str) -> str:
    if table[value].isna().all():
        return "unknown"
    best, worst = (
        f"{row['start']}: {text.percent(row[value])} ({text.percent(row['low'])} to "
        f"{text.percent(row['high'])})"
        for row in (text.largest(table, value), text.smallest(table, value))
    )
    return f"highest for {best}, lowest for {worst}" if best != worst else best


def _tell_learned(table: pd.DataFrame) -> str:
    first, level = text.smallest(table, "images"), text.percent(table["level"].iloc[0])
    soon = f"No start reaches {level}."
    if first is not None:
        soon = f"{level} is reached first by {first['start']}, after {first['images']:.0f} images."
    return f"At the end top-1 is {_ends(table, 'top1')}. {soon}"


@drawing.plot(_tell_learned)
def learned(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.learned``: final top-1, and images seen until the level is reached.

    Thin lines are the range of seeds; an arrow is an interval without end, a cross never reached.
    """
    fig, (left, right) = style.figure(7.6, 1.3 + 0.3 * len(table), 1, 2, sharey=True)
    shares = drawing.in_percent(table, "top1", "low", "high", "worst", "best", "level")
    starts = table["start"]
    colours = list(starts.map(style.colours(starts)))
    drawing.dots(left, shares, ("top1", "low", "high"), starts, colours=colours)
    left.hlines(range(len(table)), shares["worst"], shares["best"], color=colours, lw=0.9)
    left.set_xlabel("top-1 at the end (%)")
    columns = ["images", "images_low", "images_high"]
    images = table[columns].replace(np.inf, np.nan)
    end = 1.08 * max(1.0, images.max(axis=None))
    drawing.dots(right, table[columns].clip(upper=end), columns, starts, colours=colours)
    marks = table["images"].isna().map({True: "x", False: ">"})
    for row in np.flatnonzero(images[["images", "images_high"]].isna().any(axis=1)):
        look = {"marker": marks.iloc[row], "color": colours[row], "s": 24, "zorder": 4}
        right.scatter(end, row, clip_on=False, **look)
    right.set(xlim=(0, end), xlabel=f"images seen until {shares['level'].iloc[0]:.0f} % top-1")
    return drawing.finish(fig, table, caption)


def _tell_which_beats_which(table: pd.DataFrame) -> str:
    pairs = table[table["start_a"] != table["start_b"]]
    sure = pairs[pairs["beats"].astype(bool)]
    first = f"{len(sure)} of {len(pairs) // 2} pairs of starts differ beyond chance"
    top = text.largest(sure, "difference")
    if top is None:
        return f"{first}."
    lead, low, high = (text.points(top[name]) for name in ("difference", "low", "high"))
    return (
        f"{first}; the largest lead is that of {top['start_a']} over {top['start_b']}, {lead} "
        f"points of top-1 ({low} to {high})."
    )


@drawing.plot(_tell_which_beats_which)
def which_beats_which(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.which_beats_which``: row less column, bold beyond chance."""
    differences = 100 * drawing.square(table, "difference", "start")
    sure = drawing.square(table.assign(sure=table["low"] * table["high"] > 0), "sure", "start")
    blank = differences.isna() | np.eye(len(sure), dtype=bool)
    norm = CenteredNorm(0, max(float(differences.abs().max(axis=None)), 1.0))
    size = 1.7 + 0.42 * len(sure)
    look = {"cmap": style.DIVERGING, "norm": norm, "square": True, "most": len(sure), "size": 7.5}
    look |= {"annot": True, "fmt": "+.1f", "annot_kws": {"size": 6.5}, "mask": blank}
    maps, bar = {"": differences}, "ahead by (points of top-1)"
    fig, (ax,) = drawing.heat_maps(maps, bar, cols=1, panel=(size + 1.2, size), **look)
    for number, bold in zip(ax.texts, sure.to_numpy()[~blank], strict=True):
        number.set_weight("bold" if bold else "normal")
    ax.set(xlabel="of this start", ylabel="this start is ahead")
    return drawing.finish(fig, table, caption)


def _tell_contributions(rows: pd.DataFrame) -> str:
    means = rows.groupby(["group", "layer"], sort=False)["contribution"].mean().reset_index()
    return text.course(means, "contribution")


@drawing.plot(
    _tell_contributions, "Mean length of what is added to a token, over the layers", by="group"
)
def contributions(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.contributions`` by group, a panel per column there is; bands: all seeds."""
    shown = [name for name in _CONTRIBUTIONS if name in table]
    fig, axes = style.panels(len(shown), cols=3, size=(2.5, 2.3))
    look = {"hue": "group", "palette": style.colours(table["group"]), "marker": "o"}
    for ax, value in zip(axes, shown, strict=True):
        sns.lineplot(table, x="layer", y=value, errorbar=("pi", 100), ax=ax, **look)
        ax.get_legend().remove()
        ax.set(title=_CONTRIBUTIONS[value], ylabel="", ylim=(0, None))
    return drawing.finish(fig, table, caption, axes[0], layers=axes)
