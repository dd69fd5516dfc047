"""One quantity varied at a time: a small panel for each, all on the same scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, plain_log
from moee_analysis.plots.router_regret import draw_regret, router_looks

Row = tuple[float, Callable[[SubFigure], None]]

WIDTH = 7.8
DIVERGENCE = "KL(dense ‖ variant), nats"
_BASE = {"s": 26, "zorder": 4, "linewidth": 0}


@style.house
def sweeps(
    table: pd.DataFrame, *, regret: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """Draw a table of ``measure.sweeps``: a panel each, the KL divergence against the setting.

    Settings that are numbers stand on the horizontal axis (or, where they differ in MACs, beside
    their dots over these), others name rows. The first system is in the colour of its recipe, the
    second dashed. All panels have the same logarithmic scale.

    Parameters
    ----------
    regret
        A table of ``measure.router_regret``, drawn beside the rows.
    """
    rows = sweep_rows(table, recipe_colours(table), regret)
    fig, parts = style.stacked(WIDTH, [height for height, _ in rows])
    for part, (_, draw) in zip(parts, rows, strict=True):
        draw(part)
    marks = system_marks(table)
    fig.legend(
        list(marks.values()), list(marks), loc="outside upper left", ncols=len(marks), borderpad=0
    )
    return finish(fig, table, caption)


def sweep_rows(
    table: pd.DataFrame, colours: dict[str, str], regret: pd.DataFrame | None = None
) -> list[Row]:
    """Rows of panels: height in inches, and the function that draws them into a part of a figure.

    Up to four sweeps stand side by side, those of numbers first.
    """
    own = table[table["setting"].notna()].groupby("sweep", sort=False)["setting"]
    numeric = [name for name, settings in own if all(map(_is_number, settings))]
    named = [name for name, _ in own if name not in numeric]
    common = {"table": table, "colours": colours, "limits": _limits(table)}
    rows: list[Row] = [
        (1.95, partial(_draw_numeric, names=names, **common)) for names in _chunks(numeric, 3)
    ]
    longest = max((table.loc[table["sweep"] == n, "setting"].nunique() for n in named), default=5)
    last = {"regret": regret} if regret is not None else {}
    parts = _chunks([*named, *last], 4)
    rows += [
        (0.85 + 0.21 * max(longest, 4), partial(_draw_named, names=names, regret=regret, **common))
        for names in parts
    ]
    return rows


def recipe_colours(table: pd.DataFrame) -> dict[str, str]:
    """A colour for every recipe of a table, in order of appearance."""
    recipes = [name for name in dict.fromkeys(table["recipe"].dropna()) if name]
    return dict(zip(recipes, style.PALETTE, strict=False))


def system_marks(table: pd.DataFrame) -> dict[str, Line2D]:
    """How the systems of a table are drawn, in the colour of no recipe."""
    names = dict.fromkeys(table["system"])
    return {
        name: Line2D([], [], **_look(style.INK, first=place == 0))
        for place, name in enumerate(names)
    }


def _chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _is_number(setting: Any) -> bool:
    return isinstance(setting, (int, float, np.number))


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    """The scale that all panels share."""
    known = table[["kl", "kl_low", "kl_high"]].to_numpy(float)
    known = known[np.isfinite(known) & (known > 1e-5)]
    return (known.min() / 1.25, known.max() * 1.25) if len(known) else (0.01, 1.0)


def _colour(part: pd.DataFrame, colours: dict[str, str]) -> str:
    """The colour of the recipe that a sweep varies."""
    recipes = [name for name in part["recipe"] if name in colours]
    return colours[recipes[0]] if recipes else style.PALETTE[0]


def _draw_numeric(
    figure: SubFigure,
    *,
    names: list[str],
    table: pd.DataFrame,
    colours: dict[str, str],
    limits: tuple[float, float],
) -> None:
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        part = table[table["sweep"] == name]
        ax.set(yscale="log", ylim=limits, title=name)
        plain_log(ax.yaxis, subs=(1, 3))
        first = part["system"].iloc[0]
        over_macs = np.ptp(part.loc[part["system"] == first, "macs_reduction"].dropna()) > 0.02
        _draw_levels(ax, part, across=ax.axhspan, along=ax.axhline)
        for system, rows in part[part["setting"].notna()].groupby("system", sort=False):
            look = _look(_colour(part, colours), first=system == first)
            if over_macs:
                _over_macs(ax, rows, look, labelled=system == first)
            else:
                _draw_curve(ax, rows["setting"].astype(float), rows, look)
        if over_macs:
            ax.set_xlabel("MACs (% of the dense model)")
        else:
            _count_ticks(ax, sorted(part["setting"].dropna().unique()))
    axes[0].set_ylabel(DIVERGENCE)


def _look(colour: str, *, first: bool) -> dict[str, Any]:
    if first:
        return {"color": colour, "marker": "o", "ms": 4.5, "zorder": 3}
    return {"color": style.INK, "marker": "s", "ms": 3, "lw": 1, "ls": "--"}


def _draw_curve(ax: Axes, x: pd.Series, rows: pd.DataFrame, look: dict[str, Any]) -> None:
    ax.vlines(x, rows["kl_low"], rows["kl_high"], color=look["color"], lw=2, alpha=0.4)
    ax.plot(x, rows["kl"], **look)


def _over_macs(ax: Axes, rows: pd.DataFrame, look: dict[str, Any], *, labelled: bool) -> None:
    """Draw over the MACs, with the settings at the dots of the first system."""
    own = rows.sort_values("macs_reduction")
    x = 100 * (1 - own["macs_reduction"])
    _draw_curve(ax, x, own, look)
    shown = zip(x, own["setting"], own["kl"], strict=True) if labelled else ()
    for place, setting, y in shown:
        ax.annotate(
            str(setting), (place, y), (-4, -2), size=6.5, ha="right", va="top",
            textcoords="offset points", color=look["color"],
        )  # fmt: skip
    ax.margins(x=0.12)


def _count_ticks(ax: Axes, settings: list[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ax.set_xticks(settings, [f"{setting:g}" for setting in settings])


def _draw_levels(
    ax: Axes, part: pd.DataFrame, *, across: Callable[..., Any], along: Callable[..., Any]
) -> None:
    """A band and a dashed line for what does not depend on the setting, such as static pruning."""
    for level in part[part["setting"].isna() & part["kl"].notna()].to_dict("records"):
        across(level["kl_low"], level["kl_high"], color=style.INK, alpha=0.07, lw=0)
        along(level["kl"], color=style.INK, lw=1, ls="--")


def _draw_named(
    figure: SubFigure,
    *,
    names: list[str],
    table: pd.DataFrame,
    colours: dict[str, str],
    limits: tuple[float, float],
    regret: pd.DataFrame | None,
) -> None:
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    looks = {} if regret is None else router_looks(regret)
    for ax, name in zip(axes, names, strict=True):
        if name == "regret" and regret is not None:
            draw_regret(ax, regret)
            continue
        part = table[table["sweep"] == name]
        ax.set(xscale="log", xlim=limits, title=name)
        plain_log(ax.xaxis)
        _draw_levels(ax, part, across=ax.axvspan, along=ax.axvline)
        _draw_settings(ax, part[part["setting"].notna()], _colour(part, colours), looks)
        ax.set_xlabel(DIVERGENCE.replace("(dense ‖ variant)", ""))


def _draw_settings(
    ax: Axes, part: pd.DataFrame, colour: str, looks: dict[str, dict[str, str]]
) -> None:
    """A dot with its interval for every setting, on a row of its own."""
    for row, variant in enumerate(part.to_dict("records")):
        look = {"color": colour, "marker": "o"} | looks.get(variant["setting"], {})
        ax.hlines(row, variant["kl_low"], variant["kl_high"], color=look["color"], lw=2, alpha=0.45)
        ax.scatter(variant["kl"], row, **_BASE, **look)
    ax.set_yticks(range(len(part)), part["setting"].astype(str), size=7.5)
    ax.set_ylim(len(part) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
