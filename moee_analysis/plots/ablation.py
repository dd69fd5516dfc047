"""What each piece of a recipe is worth: dots sorted by effect, and what else was varied."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, sweeps, text

_TITLES = {"off in turn": "“{}”, one piece off", "on alone": "“{}”, one piece added"}
_ROW = 0.19  # inches
_DOT = {"marker": "o", "ms": 5, "ls": "", "color": style.INK}
_LOOKS = {
    "as it is": {"color": style.INK, "lw": 1.2},
    "another seed": {"color": style.INK, "lw": 0.8, "alpha": 0.35},
    "changed": _DOT,
    "changed, but perhaps by chance": _DOT | {"mfc": "white", "mew": 1.2},
    "control": _DOT | {"marker": "s"},
}


@style.house
def ablation(
    table: pd.DataFrame, *, regret: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """Draw a table of ``measure.ablation``: a row for every variant, sorted by effect.

    Lines are the recipe as it is and (pale) with other seeds; numbers are retentions in %. Rows of
    ``measure.sweeps`` get panels below, and ``regret``, a table of ``measure.router_regret``, too.
    """
    pieces = table[table["direction"].notna()]
    swept = table[table["sweep"].notna()] if "sweep" in table else table[:0]
    groups = [_sort(pieces, name) for name in _TITLES if (pieces["direction"] == name).any()]
    colours = sweeps.recipe_colours(table)
    below = sweeps.sweep_rows(swept, colours, regret) if len(swept) else []
    heights = [0.98 + _ROW * max(map(len, groups)), *(row.height for row in below)]
    fig, (top, *parts) = style.stacked(sweeps.WIDTH, heights)
    for ax, rows in zip(top.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        recipe = rows["recipe"].iloc[0]
        own = pieces[pieces["recipe"] == recipe]
        _draw_group(ax, rows, own.loc[own["direction"] == "another seed", "kl"], colours[recipe])
    sweeps.draw_rows(parts, below)
    known = {*pieces["direction"], "changed", "changed, but perhaps by chance"}
    looks = {name: look for name, look in _LOOKS.items() if name in known}
    looks |= {name: look for name, look in sweeps.looks(swept).items() if name != "MoEE"}
    drawing.legend(fig, looks, columns=len(looks))
    return drawing.finish(fig, table, caption)


def _sort(pieces: pd.DataFrame, direction: str) -> pd.DataFrame:
    """What has a row: the recipe as it is, its pieces by their effect, its controls."""
    recipe = pieces.loc[pieces["direction"] == direction, "recipe"].iloc[0]
    own = pieces[pieces["recipe"] == recipe]
    whole, changed, controls = (
        own[own["direction"] == name].sort_values("kl", ascending=ascending, kind="stable")
        for name, ascending in (
            ("as it is", True), (direction, direction == "on alone"), ("control", True),
        )
    )  # fmt: skip
    return pd.concat([whole, changed, controls])


def _draw_group(ax: Axes, rows: pd.DataFrame, seeds: pd.Series, colour: str) -> None:
    whole = rows.iloc[0]
    ax.set_title(_TITLES[rows["direction"].iloc[1]].format(whole["recipe"]), pad=15)
    ax.axvline(whole["kl"], color=colour, lw=1.2, alpha=0.9)
    for kl in seeds:
        ax.axvline(kl, color=colour, lw=0.8, alpha=0.35)
    _draw_dots(ax, rows, colour)
    changed = rows["direction"].isin(_TITLES)
    names = rows["value"].where(~changed, rows["piece"] + ": " + rows["value"])
    drawing.row_axis(ax, ["as it is", *names[1:]])
    _write_retention(ax, rows)
    ax.set(xscale="log", xlabel=sweeps.DIVERGENCE)
    low, high = ax.get_xlim()
    drawing.plain_log(ax.xaxis, subs=(1, 2, 5) if high < 100 * low else (1,))


def _draw_dots(ax: Axes, rows: pd.DataFrame, colour: str) -> None:
    places, control = np.arange(len(rows)), (rows["direction"] == "control").to_numpy()
    by_chance = (rows["kl_change_low"] <= 0) & (rows["kl_change_high"] >= 0)
    edges = np.where(control, style.INK, colour)
    faces = np.where(by_chance & (rows["direction"] != "as it is"), "white", edges)
    ax.hlines(places, rows["kl_low"], rows["kl_high"], color=edges, zorder=3, **style.INTERVAL)
    for chosen, marker in ((~control, "o"), (control, "s")):
        look = {"s": 26, "marker": marker, "facecolor": faces[chosen], "edgecolor": edges[chosen]}
        ax.scatter(rows["kl"][chosen], places[chosen], linewidth=1.2, zorder=4, **look)
    if control.any():
        ax.axhline(control.argmax() - 0.5, color=style.GREY, lw=0.6)


def _write_retention(ax: Axes, rows: pd.DataFrame) -> None:
    small = {"size": 7, "va": "center", "ha": "right", "transform": ax.get_yaxis_transform()}
    for place, row in enumerate(rows.itertuples()):
        if np.isnan(row.kl):
            missing = small | {"ha": "left", "color": style.GREY}
            ax.text(0.02, place, "no such model, see the table", **missing)
        else:
            ax.text(1.11, place, f"{100 * row.retention:.1f}", **small)
    ax.text(1.11, 1.01, "top-1 kept, %", **small | {"transform": ax.transAxes, "va": "bottom"})


@text.describes(ablation)
def _describe_ablation(table: pd.DataFrame) -> str:
    own = table.dropna(subset=["direction", "kl"])
    own = own[own["recipe"].fillna("") != ""]  # without the dense model
    whole, off, on, controls = (
        own[own["direction"] == name] for name in ("as it is", "off in turn", "on alone", "control")
    )
    recipes = text.listed(
        f"{text.bits(row.kl)} nats with {row.recipe}" for row in whole.itertuples()
    )
    words = f"KL divergence from the dense model: {recipes}."
    for first, row in (
        ("Most is lost without", text.largest(off, "kl")),
        ("Most is gained alone by", text.smallest(on, "kl")),
    ):
        if row is not None:
            words += f" {first} {row['piece']} ({text.bits(row['kl'])} nats)."
    beside = [f"{row.value} of {row.recipe} {text.bits(row.kl)}" for row in controls.itertuples()]
    return words + (f" Controls: {text.listed(beside)} nats." if beside else "")
