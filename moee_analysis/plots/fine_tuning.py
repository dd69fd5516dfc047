"""What fine-tuning gives back: against the MACs, and epoch after epoch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish

_LINE = {"lw": 1.4, "ms": 5, "mew": 1.2}
_STAGES = {"before": {"ls": "--", "mfc": "white"}, "after": {"ls": "-"}}
_MARKERS = "osD^v"
_BESIDE = 0.3  # points of MACs from a mean to its seeds
_APART = 0.8  # points of MACs between the first and the last line, so that intervals show


@style.house
def fine_tuning(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.fine_tuning``: retention against the MACs saved.

    Dashed lines and hollow marks are before, solid ones after fine-tuning, with intervals over
    images and seeds; small dots beside them are single seeds. Lines stand a little apart.
    """
    fig, ax = style.figure(6.2, 3.4)
    colours = style.colours(table["system"])
    markers = dict(zip(colours, _MARKERS, strict=False))
    lines = list(table.groupby(["system", "stage"], sort=False))
    places = np.linspace(-_APART / 2, _APART / 2, len(lines)) if len(lines) > 1 else [0.0]
    for place, ((system, stage), rows) in zip(places, lines, strict=True):
        x = 100 * rows["macs_reduction"].groupby(rows["budget"]).transform("mean") + place
        _draw_seeds(ax, x, rows, colours[system])
        whole = rows.assign(x=x).drop_duplicates("budget").sort_values("x")
        ax.vlines(
            whole["x"], 100 * whole["low"], 100 * whole["high"], color=colours[system], lw=2.2,
            alpha=0.4,
        )  # fmt: skip
        look = {"color": colours[system], "marker": markers[system], **_STAGES[stage]}
        ax.plot(whole["x"], 100 * whole["mean"], zorder=4, **_LINE, **look)
    ax.axhline(100, color=style.GREY, lw=1, zorder=0)
    ax.set(
        xlabel="MACs saved (%; lines set a little apart)",
        ylabel="top-1 retained (% of the dense model's)",
    )
    _legend(fig, colours, markers)
    return finish(fig, table, caption)


def _draw_seeds(ax: Axes, x: pd.Series, rows: pd.DataFrame, colour: str) -> None:
    if rows["seed"].nunique() > 1:
        kept = 100 * rows["retention"]
        ax.plot(x + _BESIDE, kept, ls="", marker=".", ms=3.5, color=colour)


def _legend(fig: Figure, colours: dict[str, str], markers: dict[str, str]) -> None:
    handles = [
        Line2D([], [], color=colour, marker=markers[system], **_LINE)
        for system, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color=style.INK, marker="o", **_LINE, **look) for look in _STAGES.values()
    ]
    handles.append(Line2D([], [], color=style.GREY, lw=1))
    names = [*colours, "before fine-tuning", "after fine-tuning", "dense model"]
    fig.legend(handles, names, loc="outside right center", handlelength=2.6)


@style.house
def history(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw divergence from the dense model (left) and agreement with it (right) over the epochs.

    A ring marks the epoch of the lowest divergence, whose weights are kept; a dotted line is what
    there was before any training.

    Parameters
    ----------
    table
        One row for each epoch, from 0: ``epoch``, ``loss`` (nan before any training), ``kl`` (nats)
        and ``agreement`` (a share) on images held out. With a column ``system`` there is a line for
        each of its values.
    """
    named = table if "system" in table else table.assign(system="on images held out")
    fig, (left, right) = style.figure(6.4, 2.7, 1, 2)
    colours = style.colours(named["system"])
    for system, rows in named.groupby("system", sort=False):
        _draw(left, rows, "kl", label=system, color=colours[system])
        percent = rows.assign(agreement=100 * rows["agreement"])
        _draw(right, percent, "agreement", label=system, color=colours[system])
    if len(colours) == 1:
        trained = named.dropna(subset="loss")
        left.plot(
            trained["epoch"], trained["loss"], color=style.GREY, marker=".", label="training loss"
        )
    left.set(ylabel="KL(dense || model) (nats)", title="divergence from the dense model")
    right.set(ylabel="same prediction (% of images)", title="agreement with the dense model")
    left.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("epoch (0: before fine-tuning)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    return finish(fig, table, caption)


def _draw(ax: Axes, rows: pd.DataFrame, value: str, *, label: str, color: str) -> None:
    ax.axhline(rows[value].iloc[0], color=color, lw=0.9, ls=":")
    ax.plot(
        rows["epoch"], rows[value], color=color, label=label, marker="o", ms=4, mec="white", mew=0.5
    )
    kept = rows.loc[rows["kl"].idxmin()]
    ax.plot(kept["epoch"], kept[value], "o", ms=9, mfc="none", mec=color, mew=1.2)
