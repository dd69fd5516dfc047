"""One quantity varied at a time: a small panel for each, all on the same scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from moee_analysis.plots import drawing, style, text
from moee_analysis.plots.routing import draw_regret

WIDTH = 7.8
DIVERGENCE = "KL(dense ‖ variant), nats"


@dataclass(frozen=True)
class Row:
    """Panels side by side: their height in inches, and the function that draws each."""

    height: float
    panels: Sequence[Callable[[Axes], None]]
    sharey: bool


@style.house
def sweeps(
    table: pd.DataFrame, *, regret: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """Draw a table of ``measure.sweeps``: a panel each, on the same scale; and maybe ``regret``.

    Settings that are numbers stand on the axis (or at their dots, over MACs), others name rows.
    """
    rows = sweep_rows(table, recipe_colours(table), regret)
    fig, parts = style.stacked(WIDTH, [row.height for row in rows])
    draw_rows(parts, rows)
    drawing.legend(fig, looks(table))
    return drawing.finish(fig, table, caption)


def sweep_rows(
    table: pd.DataFrame, colours: dict[str, str], regret: pd.DataFrame | None = None
) -> list[Row]:
    """Up to three sweeps of numbers side by side, then up to four of names."""
    routers = {} if regret is None else style.looks(regret["router"])
    curves, dots, most = [], [], 4
    for name, rows in table.groupby("sweep", sort=False):
        recipe = next((one for one in rows["recipe"] if one in colours), None)
        look = {"colour": colours.get(recipe, style.PALETTE[0]), "limits": _limits(table)}
        settings = rows["setting"].dropna()
        if all(isinstance(setting, Real) for setting in settings):
            curves.append(partial(_draw_numbers, rows=rows, title=name, **look))
        else:
            dots.append(partial(_draw_names, rows=rows, title=name, routers=routers, **look))
            most = max(most, settings.nunique())
    if regret is not None:
        dots.append(partial(draw_regret, table=regret))
    three = [Row(1.95, curves[at : at + 3], sharey=True) for at in range(0, len(curves), 3)]
    height = 0.85 + 0.21 * most
    return three + [Row(height, dots[at : at + 4], sharey=False) for at in range(0, len(dots), 4)]


def draw_rows(parts: Sequence[SubFigure], rows: Sequence[Row]) -> None:
    """Draw each row of panels into a part of a figure."""
    for part, row in zip(parts, rows, strict=True):
        axes = part.subplots(1, len(row.panels), sharey=row.sharey, squeeze=False)[0]
        for ax, draw in zip(axes, row.panels, strict=True):
            draw(ax)
            if row.sharey:
                ax.label_outer()


def recipe_colours(table: pd.DataFrame) -> dict[str, str]:
    """A colour for every recipe of a table, in order of appearance."""
    recipes = [name for name in table["recipe"].dropna().unique() if name]
    return dict(zip(recipes, style.PALETTE, strict=False))


def looks(table: pd.DataFrame, colour: str = style.INK) -> dict[str, drawing.Look]:
    """How the systems of a table are drawn: the first in ``colour``, others dashed."""
    first = {"color": colour, "marker": "o", "ms": 4.5, "zorder": 3}
    other = {"color": style.INK, "marker": "s", "ms": 3, "lw": 1, "ls": "--"}
    names = table["system"].unique() if len(table) else ()
    return {name: other if place else first for place, name in enumerate(names)}


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    known = table[["kl", "kl_low", "kl_high"]].to_numpy(float)
    known = known[np.isfinite(known) & (known > 1e-5)]
    return (known.min() / 1.25, known.max() * 1.25) if len(known) else (0.01, 1.0)


def _draw_numbers(
    ax: Axes, *, rows: pd.DataFrame, title: str, colour: str, limits: tuple[float, float]
) -> None:
    """Divergence over the setting, or over the MACs where these differ."""
    ax.set(yscale="log", ylim=limits, title=title, ylabel=DIVERGENCE)
    drawing.plain_log(ax.yaxis, subs=(1, 3))
    _draw_levels(rows, ax.axhspan, ax.axhline)
    first, settings = rows["system"].iloc[0], rows.dropna(subset="setting")
    saved = rows.loc[rows["system"] == first, "macs_reduction"]
    over_macs = saved.max() - saved.min() > 0.02
    x = 100 * (1 - settings["macs_reduction"]) if over_macs else settings["setting"].astype(float)
    settings = settings.assign(x=x).sort_values("x")
    for system, look in looks(rows, colour).items():
        own = settings[settings["system"] == system]
        ax.vlines(own["x"], own["kl_low"], own["kl_high"], color=look["color"], **style.INTERVAL)
        ax.plot(own["x"], own["kl"], **look)
    if over_macs:
        _write_settings(ax, settings[settings["system"] == first], colour)
        ax.set_xlabel("MACs (% of the dense model)")
    else:
        names = sorted(settings["setting"].unique())
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
        ax.set_xticks(names, [f"{name:g}" for name in names])


def _write_settings(ax: Axes, rows: pd.DataFrame, colour: str) -> None:
    beside = {"xytext": (-4, -2), "textcoords": "offset points", "ha": "right", "va": "top"}
    for row in rows.dropna(subset=["x", "kl"]).itertuples():
        ax.annotate(str(row.setting), (row.x, row.kl), size=6.5, color=colour, **beside)
    ax.margins(x=0.12)


def _draw_levels(
    rows: pd.DataFrame, across: Callable[..., object], along: Callable[..., object]
) -> None:
    """A band and a dashed line for what does not depend on the setting, such as static pruning."""
    for level in rows[rows["setting"].isna() & rows["kl"].notna()].itertuples():
        across(level.kl_low, level.kl_high, color=style.INK, alpha=0.07, lw=0)
        along(level.kl, color=style.INK, lw=1, ls="--")


def _draw_names(
    ax: Axes, *, rows: pd.DataFrame, title: str, colour: str, limits: tuple[float, float],
    routers: dict[str, drawing.Look],
) -> None:  # fmt: skip
    """A dot with its interval for every setting, on a row of its own."""
    ax.set(xscale="log", xlim=limits, title=title, xlabel="KL, nats")
    drawing.plain_log(ax.xaxis)
    _draw_levels(rows, ax.axvspan, ax.axvline)
    settings = rows.dropna(subset="setting")
    for place, row in enumerate(settings.itertuples()):
        look = routers.get(row.setting, {"color": colour, "marker": "o"})
        ax.hlines(place, row.kl_low, row.kl_high, color=look["color"], **style.INTERVAL)
        ax.scatter(row.kl, place, s=26, zorder=4, linewidth=0, **look)
    drawing.row_axis(ax, settings["setting"].astype(str), size=7.5)


@text.describes(sweeps)
def _describe_sweeps(table: pd.DataFrame) -> str:
    words = []
    for name, rows in table.dropna(subset="setting").groupby("sweep", sort=False):
        best = text.smallest(rows[rows["system"] == rows["system"].iloc[0]], "kl")
        if best is not None:
            setting = " ".join(str(best["setting"]).split())
            words.append(f"{name}: {setting} ({text.bits(best['kl'])})")
    return f"Lowest KL divergence, in nats: {'; '.join(words) or 'unknown'}."
