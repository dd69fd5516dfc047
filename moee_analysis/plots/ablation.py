"""What each piece of a recipe is worth: dots sorted by effect, and what else was varied."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, plain_log
from moee_analysis.plots.sweeps import (
    DIVERGENCE,
    WIDTH,
    recipe_colours,
    sweep_rows,
    system_marks,
)

_TITLES = {
    "off in turn": "“{}”, one piece off",
    "on alone": "“{}”, one piece added",
}
_ROW = 0.19  # inches


@style.house
def ablation(
    table: pd.DataFrame, *, regret: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """Draw a table of ``measure.ablation``: a row for every variant, sorted by effect.

    All panels show the KL divergence from the dense model's prediction, on logarithmic axes; the
    numbers beside the rows are retentions in %. The line is the recipe as it is, pale lines the
    same with other seeds, squares are controls. A dot is hollow where the change from the recipe
    may be chance.

    Parameters
    ----------
    regret
        A table of ``measure.router_regret``, drawn beside the sweep of the routers.
    table
        Rows of ``measure.sweeps`` may follow: they get panels of their own below.
    """
    pieces = table[table["direction"].notna()]
    colours = recipe_colours(table)
    directions = [name for name in _TITLES if (pieces["direction"] == name).any()]
    groups = [_group(pieces, direction) for direction in directions]
    most = max(len(shown) for _, shown in groups)
    rows = [(0.98 + _ROW * most, partial(_draw_groups, groups=groups, colours=colours))]
    swept = table[table["sweep"].notna()] if "sweep" in table else table.iloc[:0]
    if len(swept):
        rows += sweep_rows(swept, colours, regret)
    fig, parts = style.stacked(WIDTH, [height for height, _ in rows])
    for part, (_, draw) in zip(parts, rows, strict=True):
        draw(part)
    _legend(fig, pieces, swept)
    return finish(fig, table, caption)


def _group(table: pd.DataFrame, direction: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The recipe with other seeds, and what has a row: as it is, pieces by effect, controls."""
    recipe = table.loc[table["direction"] == direction, "recipe"].iloc[0]
    own = table[table["recipe"] == recipe]
    again = own[own["direction"] == "another seed"]
    whole = own[own["direction"] == "as it is"]
    pieces = own[own["direction"] == direction].sort_values(
        "kl", ascending=direction == "on alone", kind="stable"
    )
    controls = own[own["direction"] == "control"].sort_values("kl", kind="stable")
    return again, own.loc[[*whole.index, *pieces.index, *controls.index]]


def _draw_groups(
    part: SubFigure,
    *,
    groups: list[tuple[pd.DataFrame, pd.DataFrame]],
    colours: dict[str, str],
) -> None:
    axes = part.subplots(1, len(groups), squeeze=False)[0]
    for ax, (again, shown) in zip(axes, groups, strict=True):
        whole = shown.iloc[0]
        colour = colours[whole["recipe"]]
        ax.set_title(_TITLES[shown["direction"].iloc[1]].format(whole["recipe"]), pad=15)
        ax.axvline(whole["kl"], color=colour, lw=1.2, alpha=0.9)
        for kl in again["kl"]:
            ax.axvline(kl, color=colour, lw=0.8, alpha=0.35)
        _draw_rows(ax, shown, colour)
        _name_rows(ax, shown)
        plain_log(ax.xaxis, subs=(1, 2, 5))
        ax.set_xlabel(DIVERGENCE)


def _draw_rows(ax: Axes, shown: pd.DataFrame, colour: str) -> None:
    rows = np.arange(len(shown))
    control = (shown["direction"] == "control").to_numpy()
    colours = np.where(control, style.INK, colour)
    ax.hlines(rows, shown["kl_low"], shown["kl_high"], color=colours, lw=2.2, alpha=0.45, zorder=3)
    faces = np.where(_may_be_chance(shown), "white", colours)
    for chosen, marker in ((~control, "o"), (control, "s")):
        ax.scatter(
            shown["kl"][chosen], rows[chosen], s=26, marker=marker, facecolor=faces[chosen],
            edgecolor=colours[chosen], linewidth=1.2, zorder=4,
        )  # fmt: skip
    if control.any():
        ax.axhline(np.flatnonzero(control)[0] - 0.5, color=style.GREY, lw=0.6)
    ax.set_xscale("log")
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _may_be_chance(shown: pd.DataFrame) -> np.ndarray:
    """Where the interval of the change holds zero; the recipe itself does not count."""
    held = (shown["kl_change_low"] <= 0) & (shown["kl_change_high"] >= 0)
    return (held & (shown["direction"] != "as it is")).to_numpy()


def _name_rows(ax: Axes, shown: pd.DataFrame) -> None:
    """Write what differs to the left of each row, and the retention to the right."""
    beside = ax.get_yaxis_transform()
    small = {"size": 7, "color": style.INK, "transform": beside, "va": "center", "ha": "right"}
    names = []
    for row, variant in enumerate(shown.to_dict("records")):
        named = variant["direction"] in _TITLES
        names.append(f"{variant['piece']}: {variant['value']}" if named else variant["value"])
        if np.isnan(variant["kl"]):
            missing = small | {"ha": "left", "color": style.GREY}
            ax.text(0.02, row, "no such model, see the table", **missing)
        else:
            ax.text(1.11, row, f"{100 * variant['retention']:.1f}", **small)
    names[0] = "as it is"
    ax.set_yticks(range(len(shown)), names)
    ax.text(1.11, 1.01, "top-1 kept, %", **small | {"transform": ax.transAxes, "va": "bottom"})


def _legend(fig: Figure, pieces: pd.DataFrame, swept: pd.DataFrame) -> None:
    """What lines, dots and squares stand for, in the colour of none of the recipes."""
    dot = {"marker": "o", "ms": 5, "ls": "", "color": style.INK}
    marks = {
        "as it is": Line2D([], [], color=style.INK, lw=1.2),
        "another seed": Line2D([], [], color=style.INK, lw=0.8, alpha=0.35),
        "changed": Line2D([], [], **dot),
        "changed, but perhaps by chance": Line2D([], [], **dot, mfc="white"),
        "control": Line2D([], [], **dot | {"marker": "s"}),
    }
    marks = {n: m for n, m in marks.items() if "changed" in n or (pieces["direction"] == n).any()}
    if len(swept):
        marks |= {name: mark for name, mark in system_marks(swept).items() if name != "MoEE"}
    fig.legend(
        list(marks.values()), list(marks), loc="outside upper left", ncols=len(marks), borderpad=0
    )
