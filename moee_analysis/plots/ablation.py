"""What each piece of a recipe is worth, and one quantity varied at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text
from moee_analysis.plots.routing import draw_regret

_Row = tuple[float, bool, Sequence[Callable[[Axes], None]]]  # inches, one y-axis for all, panels
_DIVERGENCE = "KL(dense ‖ variant), nats"
_KL = ("kl", "kl_low", "kl_high")

_TITLES = {"off in turn": "“{}”, one piece off", "on alone": "“{}”, one piece added"}
_DOT = {"marker": "o", "ms": 5, "ls": "", "color": style.INK}
_LOOKS = {
    "as it is": {"color": style.INK, "lw": 1.2},
    "another seed": {"color": style.INK, "lw": 0.8, "alpha": 0.35},
    "changed": _DOT,
    "changed, but perhaps by chance": _DOT | {"mfc": "white", "mew": 1.2},
    "control": _DOT | {"marker": "s"},
}


def _tell_sweeps(table: pd.DataFrame) -> str:
    words = []
    for name, rows in table.dropna(subset=["setting", "kl"]).groupby("sweep", sort=False):
        best = text.smallest(rows[rows["system"] == rows["system"].iloc[0]], "kl")
        setting = " ".join(str(best["setting"]).split())
        words.append(f"{name}: {setting} ({text.bits(best['kl'])})")
    return f"Lowest KL divergence, in nats: {'; '.join(words) or 'unknown'}."


def _tell_ablation(table: pd.DataFrame) -> str:
    if "direction" not in table:
        return _tell_sweeps(table)
    own = table.dropna(subset=["direction", "kl"]).query("recipe != ''")  # without the dense model
    whole, off, on, controls = (
        own[own["direction"] == name] for name in ("as it is", "off in turn", "on alone", "control")
    )
    named = text.listed(f"{text.bits(row.kl)} nats with {row.recipe}" for row in whole.itertuples())
    words = f"KL divergence from the dense model: {named}."
    for first, row in (
        ("Most is lost without", text.largest(off, "kl")),
        ("Most is gained alone by", text.smallest(on, "kl")),
    ):
        if row is not None:
            words += f" {first} {row['piece']} ({text.bits(row['kl'])} nats)."
    beside = [f"{row.value} of {row.recipe} {text.bits(row.kl)}" for row in controls.itertuples()]
    return words + (f" Controls: {text.listed(beside)} nats." if beside else "")


@drawing.plot(_tell_ablation)
def ablation(
    table: pd.DataFrame, *, regret: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """Draw ``measure.ablation``: a row for every variant, sorted by effect.

    Lines are the recipe as it is and (pale) with other seeds; numbers are retentions in %. Rows of
    ``measure.sweeps``, which may be all, get panels below, and ``regret``, a table of
    ``measure.router_regret``, too.
    """
    table = table if "direction" in table else table.assign(direction=None)
    pieces = table[table["direction"].notna()]
    swept = table[table["sweep"].notna()] if "sweep" in table else table[:0]
    groups = [_sort(pieces, name) for name in _TITLES if (pieces["direction"] == name).any()]
    recipes = [name for name in table["recipe"].dropna().unique() if name]
    colours = dict(zip(recipes, style.PALETTE, strict=False))
    below = _plan_rows(swept, colours, regret) if len(swept) else []
    heights = [0.98 + 0.19 * max(map(len, groups))] if groups else []
    fig, parts = style.stack_parts(7.8, [*heights, *(height for height, *_ in below)])
    tops = parts.pop(0).subplots(1, len(groups), squeeze=False)[0] if groups else ()
    for ax, rows in zip(tops, groups, strict=True):
        recipe = rows["recipe"].iloc[0]
        own = pieces[pieces["recipe"] == recipe]
        _draw_group(ax, rows, own.loc[own["direction"] == "another seed", "kl"], colours[recipe])
    for part, (_, sharey, panels) in zip(parts, below, strict=True):
        axes = part.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
        for ax, draw in zip(axes, panels, strict=True):
            draw(ax)
            if sharey:
                ax.label_outer()
    known = {*pieces["direction"], "changed", "changed, but perhaps by chance"}
    marks = {name: look for name, look in _LOOKS.items() if name in known}
    marks |= {name: look for name, look in _system_looks(swept).items() if name != "MoEE"}
    return drawing.finish(fig, table, caption, marks, columns=len(marks))


def _sort(pieces: pd.DataFrame, direction: str) -> pd.DataFrame:
    """What has a row: the recipe as it is, its pieces by their effect, its controls."""
    recipe = pieces.loc[pieces["direction"] == direction, "recipe"].iloc[0]
    own = pieces[pieces["recipe"] == recipe]
    ascending = {"as it is": True, direction: direction == "on alone", "control": True}
    return pd.concat(
        own[own["direction"] == name].sort_values("kl", ascending=up, kind="stable")
        for name, up in ascending.items()
    )


def _draw_group(ax: Axes, rows: pd.DataFrame, seeds: pd.Series, colour: str) -> None:
    whole = rows.iloc[0]
    ax.set_title(_TITLES[rows["direction"].iloc[1]].format(whole["recipe"]), pad=15)
    ax.axvline(whole["kl"], color=colour, lw=1.2, alpha=0.9)
    for kl in seeds:
        ax.axvline(kl, color=colour, lw=0.8, alpha=0.35)
    control = (rows["direction"] == "control").to_numpy()
    by_chance = (rows["kl_change_low"] <= 0) & (rows["kl_change_high"] >= 0)
    edges = np.where(control, style.INK, colour)
    faces = np.where(by_chance & (rows["direction"] != "as it is"), "white", edges)
    changed, look = rows["direction"].isin(_TITLES), {"colours": edges, "faces": faces}
    names = ["as it is", *rows["value"].where(~changed, rows["piece"] + ": " + rows["value"])[1:]]
    drawing.dots(ax, rows, _KL, names, markers=np.where(control, "s", "o"), **look)
    if control.any():
        ax.axhline(control.argmax() - 0.5, color=style.GREY, lw=0.6)
    _write_retention(ax, rows)
    ax.set(xscale="log", xlabel=_DIVERGENCE)
    low, high = ax.get_xlim()
    drawing.plain_log(ax.xaxis, subs=(1, 2, 5) if high < 100 * low else (1,))


def _write_retention(ax: Axes, rows: pd.DataFrame) -> None:
    # as far from the axes as the longest number needs, however wide they are
    aside = {"xytext": (29, 0), "textcoords": "offset points", "size": 7, "ha": "right"}
    for place, row in enumerate(rows.itertuples()):
        at = {"xy": (1, place), "xycoords": ax.get_yaxis_transform(), "va": "center"}
        if np.isnan(row.kl):
            missing = at | {"xy": (0.02, place), "size": 7, "color": style.GREY}
            ax.annotate("no such model, see the table", **missing)
        else:
            ax.annotate(f"{100 * row.retention:.1f}", **aside | at)
    ax.annotate("top-1, % of dense", (1, 1.01), xycoords="axes fraction", va="bottom", **aside)


def _plan_rows(
    table: pd.DataFrame, colours: dict[str, str], regret: pd.DataFrame | None
) -> list[_Row]:
    """Up to three sweeps of numbers side by side, then up to four of names; all on one scale.

    Settings that are numbers stand on the axis (or at their dots, over MACs), others name rows.
    """
    routers = {} if regret is None else style.looks(regret["router"])
    known = table[[*_KL]].to_numpy(float)
    known = known[np.isfinite(known) & (known > 1e-5)]
    limits = (known.min() / 1.25, known.max() * 1.25) if len(known) else (0.01, 1.0)
    curves, dots, most = [], [], 4
    for name, rows in table.groupby("sweep", sort=False):
        recipe = next((one for one in rows["recipe"] if one in colours), None)
        look = {"colour": colours.get(recipe, style.PALETTE[0]), "limits": limits}
        settings = rows["setting"].dropna()
        if all(isinstance(setting, Real) for setting in settings):
            curves.append(partial(_draw_numbers, rows=rows, title=name, **look))
        else:
            dots.append(partial(_draw_names, rows=rows, title=name, routers=routers, **look))
            most = max(most, settings.nunique())
    if regret is not None:
        dots.append(partial(draw_regret, table=regret))
    height = 0.85 + 0.21 * most
    return [
        *((1.95, True, curves[at : at + 3]) for at in range(0, len(curves), 3)),
        *((height, False, dots[at : at + 4]) for at in range(0, len(dots), 4)),
    ]


def _system_looks(table: pd.DataFrame, colour: str = style.INK) -> dict[str, drawing.Look]:
    """The first system in ``colour``, others dashed."""
    first = {"color": colour, "marker": "o", "ms": 4.5, "zorder": 3}
    other = {"color": style.INK, "marker": "s", "ms": 3, "lw": 1, "ls": "--"}
    names = table["system"].unique() if len(table) else ()
    return {name: other if place else first for place, name in enumerate(names)}


def _draw_numbers(
    ax: Axes, *, rows: pd.DataFrame, title: str, colour: str, limits: tuple[float, float]
) -> None:
    """Divergence over the setting, or over the MACs where these differ."""
    ax.set(yscale="log", ylim=limits, title=title, ylabel=_DIVERGENCE)
    drawing.plain_log(ax.yaxis, subs=(1, 3))
    _draw_levels(rows, ax.axhspan, ax.axhline)
    first, settings = rows["system"].iloc[0], rows.dropna(subset="setting")
    saved = rows.loc[rows["system"] == first, "macs_reduction"]
    over_macs = saved.max() - saved.min() > 0.02
    x = 100 * (1 - settings["macs_reduction"]) if over_macs else settings["setting"].astype(float)
    settings, looks = settings.assign(x=x).sort_values("x"), _system_looks(rows, colour)
    drawing.beside(ax, settings, ("x", *_KL), by="system", looks=looks, apart=0)
    if over_macs:
        beside = {"xytext": (-4, -2), "textcoords": "offset points", "ha": "right", "va": "top"}
        named = settings[settings["system"] == first].dropna(subset=["x", "kl"])
        for row in named.itertuples():
            ax.annotate(str(row.setting), (row.x, row.kl), size=6.5, color=colour, **beside)
        ax.margins(x=0.12)
        ax.set_xlabel("MACs (% of the dense model)")
    else:
        names = sorted(settings["setting"].unique())
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
        ax.set_xticks(names, [f"{name:g}" for name in names])


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
    settings, plain = rows.dropna(subset="setting"), {"color": colour, "marker": "o"}
    looks = pd.DataFrame([routers.get(name, plain) for name in settings["setting"]])
    look, names = {"markers": looks["marker"], "size": 7.5}, settings["setting"].astype(str)
    drawing.dots(ax, settings, _KL, names, colours=looks["color"], **look)
