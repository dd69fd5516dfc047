"""What each piece of a recipe is worth: dots sorted by effect, and sweeps of one quantity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, legend_above, whole_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_TITLES = {
    "off in turn": "“{}”, each piece off in turn",
    "on alone": "“{}”, each piece added alone",
}
_BLUE, _RED = style.PALETTE[:2]
_MARKERS = "osD^vP*"


@style.house
def ablation(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.ablation``: a row of dots for every variant, sorted by effect.

    Left retention, right the KL divergence from the dense model's prediction. The coloured line
    is the recipe as it is, pale lines the same with other seeds; squares are controls.
    """
    directions = [name for name in _TITLES if (table["direction"] == name).any()]
    groups = [_group(table, direction) for direction in directions]
    rows = [len(shown) for _, shown in groups]
    fig, axes = style.figure(
        7.6, 1.2 * len(rows) + 0.2 * sum(rows), len(rows), 2, squeeze=False, sharey="row",
        height_ratios=rows,
    )  # fmt: skip
    for (left, right), (base, shown), direction in zip(axes, groups, directions, strict=True):
        colour = _BLUE if direction == "off in turn" else _RED
        left.set_title(_TITLES[direction].format(shown["recipe"].iloc[0]))
        left.axvline(100, color=style.GREY, lw=1, zorder=0)
        right.set_xscale("log")
        _plain(right.xaxis, subs=(1, 2, 5))
        for ax, value in ((left, "retention"), (right, "kl")):
            _draw_base(ax, base, value, colour)
            _draw_rows(ax, shown, value, colour)
        _name_rows(left, shown)
    _legend(fig, table)
    axes[-1, 0].set_xlabel("retention (% of the dense top-1)")
    axes[-1, 1].set_xlabel("KL(dense ‖ variant) (nats, logarithmic)")
    return finish(fig, table, caption)


def _group(table: pd.DataFrame, direction: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The recipe as it is, and what is drawn below it: pieces by effect, then controls."""
    recipe = table.loc[table["direction"] == direction, "recipe"].iloc[0]
    own = table[table["recipe"] == recipe]
    base = own[own["direction"].isin(["as it is", "another seed"])]
    pieces = own[own["direction"] == direction].sort_values(
        "kl", ascending=direction == "on alone", kind="stable"
    )
    controls = own[own["direction"] == "control"].sort_values("kl", kind="stable")
    shown = own.loc[[*pieces.index, *controls.index]]
    return base, shown


def _draw_base(ax: Axes, base: pd.DataFrame, value: str, colour: str) -> None:
    scale = 100 if value == "retention" else 1
    for direction, number in zip(base["direction"], base[value], strict=True):
        own = direction == "as it is"
        ax.axvline(scale * number, color=colour, lw=1.3 if own else 0.8, alpha=0.9 if own else 0.35)


def _draw_rows(ax: Axes, shown: pd.DataFrame, value: str, colour: str) -> None:
    rows = np.arange(len(shown))
    control = (shown["direction"] == "control").to_numpy()
    if value == "retention":
        ends = 100 * shown[["retention_low", "retention_high"]].to_numpy(float)
        colours = np.where(control, style.INK, colour)
        ax.hlines(rows, ends[:, 0], ends[:, 1], color=colours, lw=2.2, alpha=0.45, zorder=3)
    x = shown[value].to_numpy(float) * (100 if value == "retention" else 1)
    ax.scatter(x[~control], rows[~control], s=30, color=colour, zorder=4)
    ax.scatter(x[control], rows[control], s=26, color=style.INK, marker="s", zorder=4)
    if control.any() and not control.all():
        ax.axhline(np.flatnonzero(control)[0] - 0.5, color=style.GREY, lw=0.6)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _plain(axis: Axis, *, subs: tuple[float, ...] = (1,)) -> None:
    """Write the ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _legend(fig: Figure, table: pd.DataFrame) -> None:
    """What lines, dots and squares stand for, in the colour of none of the recipes."""
    marks = {
        "recipe as it is": Line2D([], [], color=style.INK, lw=1.3),
        "another seed": Line2D([], [], color=style.INK, lw=0.8, alpha=0.35),
        "one piece changed": Line2D([], [], color=style.INK, marker="o", ms=5, ls=""),
        "control": Line2D([], [], color=style.INK, marker="s", ms=5, ls=""),
        "dense": Line2D([], [], color=style.GREY, lw=1),
    }
    shown = {"control": "control", "another seed": "another seed"}
    names = [n for n in marks if n not in shown or (table["direction"] == shown[n]).any()]
    fig.legend(
        [marks[name] for name in names], names, loc="outside upper left", ncols=len(names),
        borderpad=0,
    )  # fmt: skip


def _name_rows(ax: Axes, shown: pd.DataFrame) -> None:
    names = [
        value if direction == "control" else f"{piece}: {value}"
        for piece, value, direction in zip(
            shown["piece"], shown["value"], shown["direction"], strict=True
        )
    ]
    ax.set_yticks(range(len(shown)), names)
    for row, missing in enumerate(shown["kl"].isna()):
        if missing:
            ax.text(0.02, row, "no such model, see the table", size=7, color=style.GREY,
                    transform=ax.get_yaxis_transform(), va="center")  # fmt: skip


@style.house
def sweeps(
    table: pd.DataFrame, *, over_macs: Sequence[str] = (), caption: str | None = None
) -> Figure:
    """Draw a table of ``measure.sweeps``: a panel each, retention against the setting.

    Parameters
    ----------
    over_macs
        Sweeps whose settings differ in MACs: drawn over these, with the settings at the dots.
    """
    names = list(dict.fromkeys(table["sweep"]))
    looks = _looks(list(dict.fromkeys(table["system"])))
    fig, axes = style.panels(len(names), cols=3, size=(2.75, 2.2))
    for ax, name in zip(axes, names, strict=True):
        part = table[table["sweep"] == name]
        ax.axhline(100, color=style.GREY, lw=1, zorder=0, label="dense (100 %)")
        place = _over_macs if name in over_macs else _over_settings
        place(ax, part, looks)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.set_title(name)
    legend_above(fig, axes[0])
    fig.supylabel("retention (% of the dense top-1)")
    return finish(fig, table, caption)


def _over_macs(ax: Axes, part: pd.DataFrame, looks: dict[str, dict]) -> None:
    for system, rows in part.groupby("system", sort=False):
        own = rows.sort_values("macs_reduction")
        x = 100 * (1 - own["macs_reduction"])
        _draw_curve(ax, x, own, looks[system])
        if system == part["system"].iloc[0]:
            for place, setting, y in zip(x, own["setting"], 100 * own["retention"], strict=True):
                ax.annotate(
                    str(setting), (place, y), (-4, 2), size=6.5, ha="right", va="bottom",
                    textcoords="offset points", color=looks[system]["color"],
                )  # fmt: skip
    ax.margins(x=0.1)
    ax.set_xlabel("MACs (% of the dense model)")


def _over_settings(ax: Axes, part: pd.DataFrame, looks: dict[str, dict]) -> None:
    varied = part[part["setting"].notna()]
    settings = list(dict.fromkeys(varied["setting"]))
    numbers = all(isinstance(setting, (int, float)) for setting in settings)
    places = {setting: setting if numbers else row for row, setting in enumerate(settings)}
    for _, level in part[part["setting"].isna()].iterrows():
        _draw_level(ax, level, looks[level["system"]])
    for system, rows in varied.groupby("system", sort=False):
        look = looks[system] | ({} if numbers else {"ls": ""})
        _draw_curve(ax, rows["setting"].map(places), rows, look)
    if numbers:
        ax.set_xscale("log", base=2)
        ax.minorticks_off()
    else:
        ax.set_xlim(-0.5, len(settings) - 0.5)
        ax.grid(visible=False, axis="x")
    size = 8 if numbers else 7
    ax.set_xticks(list(places.values()), [str(setting) for setting in places], size=size)


def _looks(systems: Sequence[str]) -> dict[str, dict]:
    """How each system is drawn: the first in colour, others to compare with."""
    first = {"color": _BLUE, "marker": "o", "ms": 4.5, "zorder": 3}
    others = ({"marker": "s", "ms": 3, "lw": 1, "ls": "--"}, {"marker": "D", "ms": 3, "lw": 1})
    inks = (style.INK, style.PALETTE[2])
    looks = [first, *(look | {"color": ink} for look, ink in zip(others, inks, strict=True))]
    return {name: look | {"label": name} for name, look in zip(systems, looks, strict=False)}


def _draw_curve(ax: Axes, x: pd.Series, rows: pd.DataFrame, look: dict) -> None:
    low, high = 100 * rows["retention_low"], 100 * rows["retention_high"]
    ax.vlines(x, low, high, color=look["color"], lw=2, alpha=0.4)
    ax.plot(x, 100 * rows["retention"], **look)


def _draw_level(ax: Axes, row: pd.Series, look: dict) -> None:
    low, high = 100 * row["retention_low"], 100 * row["retention_high"]
    ax.axhspan(low, high, color=look["color"], alpha=0.07, lw=0)
    ax.axhline(100 * row["retention"], color=look["color"], lw=1, ls="--")


@style.house
def router_regret(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.router_regret``: a line for every router over the layers.

    Left the error under each router, right what of it a better choice of experts could save.
    """
    routers = list(dict.fromkeys(table["router"]))
    fig, (left, right) = style.figure(7.2, 2.7, 1, 2)
    for number, router in enumerate(routers):
        rows = table[table["router"] == router].sort_values("layer")
        look = {
            "color": style.PALETTE[number],
            "marker": _MARKERS[number],
            "ms": 4,
            "label": router,
        }
        left.plot(rows["layer"], 100 * rows["error"], **look)
        if (rows["regret"] > 0).any():
            right.plot(rows["layer"], 100 * rows["regret"], **look)
    for ax, name in (
        (left, "squared error of the output"),
        (right, "regret: error beyond the best expert's"),
    ):
        ax.set(yscale="log", title=name)
        _plain(ax.yaxis)
        whole_layers(ax)
    left.set_ylabel("% of the dense output's variance")
    fig.supxlabel(style.LAYER_AXIS)
    legend_above(fig, left, columns=5)
    return finish(fig, table, caption)
