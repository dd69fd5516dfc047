"""How much of the dense accuracy systems retain, against what they save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.lines import Line2D

from moee_analysis.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HUES = (  # of a family, from its first system to its last
    ("#F2B56B", "#D55E00", "#6B2A00"),
    ("#66C2A4", "#00684A"),
    ("#CC79A7", "#571F40"),
    ("#56B4E9", "#0B3C8C"),
)
_DASHES = ("--", "-", ":", "-.")
_MARKERS = "osD^vPX"
_LINE = {"lw": 1.4, "ms": 4.8, "mec": "white", "mew": 0.5}
_PANEL, _NARROW, _BUDGET, _LEGEND = 3.9, 2.2, 0.95, 2.1  # widths in inches
_APART = 0.8  # points of MACs between the first and the last system, so that intervals show
_BESIDE = 0.64  # of a budget's place, likewise


@dataclass(frozen=True)
class _Look:
    """How one system is drawn."""

    color: str
    marker: str
    dashes: str


@style.house
def fidelity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw retention against the MACs saved, one line for each system.

    Left: budgets of the MACs alone, over the MACs that were really saved. Right, if there are any:
    budgets of MACs and stored parameters, in steps, as they were asked for. Systems stand a little
    apart, so that none hides the intervals of another.

    Parameters
    ----------
    table
        One row for each system and budget: ``system``, ``family`` (its systems share a hue and a
        kind of line, and a heading in the legend), ``macs_asked``, ``params_asked`` (nan: free),
        ``macs_reduction``, ``retention``, ``retention_low``, ``retention_high``, all shares. Rows
        without retention are left out.
    """
    known = table[table["retention"].notna()]
    bound = known["params_asked"].notna()
    budgets = _budgets(known[bound])
    widths = [] if bound.any() and bound.all() else [_PANEL]
    if bound.any():
        widths.append(max(_NARROW, _BUDGET * len(budgets)))
    fig, axes = style.figure(
        sum(widths) + _LEGEND, 3.6, 1, len(widths), sharey=True, squeeze=False, width_ratios=widths
    )
    looks, panels = _looks(known), axes[0]
    if not bound.all():
        _draw_free(panels[0], known[~bound], looks)
    if bound.any():
        _draw_bound(panels[-1], known[bound], budgets, looks)
    for ax in panels:
        _draw_dense(ax)
    panels[0].set(ylabel="top-1 retained (% of the dense model's)")
    _legend(fig, known, looks)
    return style.caption(fig, caption or table.attrs.get("caption"))


def _budgets(bound: pd.DataFrame) -> list[tuple[float, float]]:
    """Budgets of MACs and parameters, in ascending order."""
    pairs = bound[["macs_asked", "params_asked"]].drop_duplicates()
    return sorted(pairs.itertuples(index=False, name=None))


def _draw_free(ax: Axes, table: pd.DataFrame, looks: dict[str, _Look]) -> None:
    for system, offset in _beside(table, _APART).items():
        rows = table[table["system"] == system].sort_values("macs_reduction")
        x = 100 * rows["macs_reduction"].to_numpy(float)
        _draw_line(ax, x + offset, rows, looks[system])
    ax.set(xlabel="MACs saved (%; systems set a little apart)", title="stored parameters free")


def _draw_bound(
    ax: Axes, table: pd.DataFrame, budgets: list[tuple[float, float]], looks: dict[str, _Look]
) -> None:
    for system, offset in _beside(table, _BESIDE).items():
        rows = table[table["system"] == system].sort_values(["macs_asked", "params_asked"])
        pairs = zip(rows["macs_asked"], rows["params_asked"], strict=True)
        places = np.array([budgets.index(pair) for pair in pairs])
        _draw_line(ax, places + offset, rows, looks[system])
    names = [f"−{100 * macs:g} %\n−{100 * params:g} %" for macs, params in budgets]
    ax.set_xticks(range(len(budgets)), names)
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    ax.set(xlabel="budget of MACs, of parameters", title="stored parameters bound")
    ax.grid(visible=False, axis="x")


def _beside(table: pd.DataFrame, width: float) -> dict[str, float]:
    """How far each system stands from its place, from the first on the left to the last."""
    systems = table["system"].unique()
    places = np.linspace(-width / 2, width / 2, len(systems)) if len(systems) > 1 else [0.0]
    return dict(zip(systems, places, strict=True))


def _draw_line(ax: Axes, x: np.ndarray, rows: pd.DataFrame, look: _Look) -> None:
    """Draw one system: a line, and the interval of each of its points."""
    value, low, high = (
        100 * rows[name].to_numpy(float)
        for name in ("retention", "retention_low", "retention_high")
    )
    front = 4 if look.dashes == "-" else 3
    ax.vlines(x, low, high, color=look.color, lw=2.2, alpha=0.4, zorder=front)
    ax.plot(
        x, value, color=look.color, marker=look.marker, ls=look.dashes, zorder=front, **_LINE
    )  # fmt: skip


def _draw_dense(ax: Axes) -> None:
    ax.axhline(100, color=style.GREY, lw=1, zorder=0)
    ax.set_ylim(bottom=max(-2.5, ax.get_ylim()[0]))


def _looks(table: pd.DataFrame) -> dict[str, _Look]:
    """A look for every system: hue and line by its family, shade and marker by its place in it."""
    looks = {}
    for place, (_, rows) in enumerate(table.groupby("family", sort=False)):
        systems = list(rows["system"].drop_duplicates())
        shades = LinearSegmentedColormap.from_list("", _HUES[place % len(_HUES)])
        for number, system in enumerate(systems):
            shade = number / (len(systems) - 1) if len(systems) > 1 else 0.5
            marker = _MARKERS[number % len(_MARKERS)]
            looks[system] = _Look(to_hex(shades(shade)), marker, _DASHES[place % len(_DASHES)])
    return looks


def _legend(fig: Figure, table: pd.DataFrame, looks: dict[str, _Look]) -> None:
    """Name the systems beside the panels, below the names of their families."""
    handles, names, headings = [], [], []
    for family, rows in table.groupby("family", sort=False):
        headings.append(len(names))
        handles.append(Line2D([], [], lw=0))
        names.append(family)
        for system in rows["system"].drop_duplicates():
            look = looks[system]
            line = Line2D([], [], color=look.color, marker=look.marker, ls=look.dashes, **_LINE)
            handles.append(line)
            names.append(system)
    handles.append(Line2D([], [], color=style.GREY, lw=1))
    names.append("dense model")
    legend = fig.legend(handles, names, loc="outside right center", handlelength=2.6)
    for number in headings:
        legend.get_texts()[number].set(weight="bold")
