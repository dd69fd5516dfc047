"""How models learn that start in different ways: curves, ends, and which start beats which."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moee_analysis.plots import style
from moee_analysis.plots.drawing import bar_beside, finish, heat_map, name_cells, square

_DASHES = ("-", "--", ":", "-.")


@style.house
def learning_curves(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.learning_curves``: top-1 against the images seen.

    Lines are means of the seeds, bands their intervals.
    """
    fig, ax = style.figure(7.0, 3.4)
    colours = style.colours(table["start"])
    for place, (start, colour) in enumerate(colours.items()):
        whole = table[table["start"] == start].drop_duplicates("images")
        ax.fill_between(
            whole["images"], 100 * whole["low"], 100 * whole["high"], color=colour, alpha=0.12, lw=0
        )
        ax.plot(
            whole["images"], 100 * whole["mean"], color=colour, label=start,
            ls=_DASHES[place // len(style.PALETTE) % len(_DASHES)], marker="o", ms=3,
        )  # fmt: skip
    ax.set(xlabel="training images seen", ylabel="top-1 (%)")
    ax.set_ylim(bottom=0)
    fig.legend(loc="outside right center")
    return finish(fig, table, caption)


@style.house
def learned(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.learned``, a line for each start.

    Left: final top-1, its interval, and the single seeds' range as a thin line. Right: images seen
    until the level is reached; an arrow where the interval has no end, a cross where it never is.
    """
    fig, (left, right) = style.figure(7.6, 1.3 + 0.3 * len(table), 1, 2, sharey=True)
    colours = style.colours(table["start"])
    rows, look = np.arange(len(table)), [colours[start] for start in table["start"]]
    left.hlines(rows, 100 * table["worst"], 100 * table["best"], color=look, lw=0.9)
    left.hlines(rows, 100 * table["low"], 100 * table["high"], color=look, lw=3, alpha=0.4)
    left.scatter(100 * table["top1"], rows, s=30, color=look, zorder=4)
    left.set(xlabel="top-1 at the end (%)", yticks=rows, yticklabels=table["start"])
    left.set_ylim(len(table) - 0.5, -0.5)
    _draw_reached(right, table, look)
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
    return finish(fig, table, caption)


def _draw_reached(ax: Axes, table: pd.DataFrame, look: list[str]) -> None:
    known = table[["images", "images_low", "images_high"]].replace(np.inf, np.nan).max().max()
    end = 1.08 * (1.0 if np.isnan(known) else max(known, 1.0))
    for row, (colour, (_, one)) in enumerate(zip(look, table.iterrows(), strict=True)):
        low, high = min(one["images_low"], end), min(one["images_high"], end)
        ax.hlines(row, low, high, color=colour, lw=3, alpha=0.4)
        never = np.isnan(one["images"])
        if np.isinf(one["images_high"]) and not never:
            ax.plot(end, row, ">", color=colour, ms=4, clip_on=False)
        ax.plot(
            end if never else one["images"],
            row,
            "x" if never else "o",
            color=colour,
            ms=5,
            clip_on=False,
        )
    ax.set(xlabel=f"images seen until {100 * table['level'].iloc[0]:.0f} % top-1")
    ax.set_xlim(0, end)


@style.house
def which_beats_which(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.which_beats_which``: what each row's start is ahead of each column.

    In points of top-1; bold where the interval of the difference excludes 0.
    """
    differences, names = square(table, "difference", "start")
    sure, _ = square(table.assign(sure=table["low"] * table["high"] > 0), "sure", "start")
    size = 1.7 + 0.42 * len(names)
    fig, ax = style.figure(size + 1.2, size)
    most = 100 * max(np.abs(differences).max(), 0.01)
    image = heat_map(ax, 100 * differences, cmap=style.diverging, norm=TwoSlopeNorm(0, -most, most))
    name_cells(ax, names, names, size=7.5)
    for (a, b), value in np.ndenumerate(100 * differences):
        if a != b:
            ax.text(
                b, a, f"{value:+.1f}", ha="center", va="center", size=6.5,
                weight="bold" if sure[a, b] else "normal",
                color="white" if abs(value) > 0.6 * most else style.INK,
            )  # fmt: skip
    bar_beside(fig, [ax], image, "ahead by (points of top-1)")
    return finish(fig, table, caption)
