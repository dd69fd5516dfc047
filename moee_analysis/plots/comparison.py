"""What is kept against what is saved, of many systems, family by family; and what routing adds."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish

_MARKERS = "osD^vPX"
_LINE = {"lw": 1.5, "ms": 4.8, "mec": "white", "mew": 0.5}
_FAINT = {"lw": 0.8, "color": "#C9CDD3", "zorder": 1}
_APART = 0.9  # points of MACs between the first and the last system of a panel
_CONTROLS = {
    "mean": ("its own router", "o"),
    "oracle_routing": ("oracle routing", "^"),
    "random_routing": ("random routing", "x"),
    "constant_routing": ("constant routing", "_"),
}


@style.house
def comparison(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw retention against the MACs saved (Pareto), one panel for each family of systems.

    Every panel shows all other systems in light grey, and in black the frontier: the system of each
    budget that keeps most. Bars are intervals over images and seeds. Systems of a panel stand
    a little apart. Hollow marks cannot reduce MACs.

    Parameters
    ----------
    table
        What ``comparison_table`` returns.
    """
    known = _over_seeds(table)
    families = list(known["family"].drop_duplicates())
    fig, axes = style.panels(
        len(families), cols=3, size=(2.9, 2.6), sharex=True, sharey=True
    )  # fmt: skip
    front = _frontier(known)
    for ax, family in zip(axes, families, strict=True):
        for _, rows in known[known["family"] != family].groupby("system", sort=False):
            _draw(ax, rows, **_FAINT)
        ax.plot(*front, color="black", lw=1, ls=":", zorder=2)
        ax.axhline(100, color=style.GREY, lw=1, zorder=0)
        _draw_family(ax, known[known["family"] == family])
        ax.set(title=family, ylim=(-3, 106))
    fig.supxlabel("MACs saved (%; systems set a little apart)")
    fig.supylabel("top-1 retained (% of the dense model's)")
    handles = [Line2D([], [], color="black", lw=1, ls=":"), Line2D([], [], **_FAINT)]
    handles.append(Line2D([], [], color=style.GREY, lw=1))
    names = ["most that a system keeps", "systems of other families", "dense model"]
    fig.legend(handles, names, loc="outside upper left", ncols=3, borderpad=0)
    return finish(fig, table, caption)


@style.house
def routing_controls(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw what each routed system keeps with its own router and with controls in its place.

    One panel for each budget of MACs; the grey line is the best static pruning at that budget.

    Parameters
    ----------
    table
        What ``comparison_table`` returns.
    """
    routed = _over_seeds(table).dropna(subset="random_routing")
    budgets = sorted(routed["macs_asked"].unique())
    systems = list(routed["system"].drop_duplicates())
    fig, axes = style.figure(
        2.4 + 2.4 * len(budgets), 1.3 + 0.3 * len(systems), 1, len(budgets), sharey=True,
        sharex=True, squeeze=False,
    )  # fmt: skip
    for ax, budget in zip(axes[0], budgets, strict=True):
        rows = routed[routed["macs_asked"] == budget].set_index("system").reindex(systems)
        _draw_controls(ax, rows)
        ax.set_title(f"asked for −{100 * budget:g} % MACs")
    axes[0, 0].set_yticks(range(len(systems)), systems)
    axes[0, 0].invert_yaxis()
    fig.supxlabel("top-1 retained (% of the dense model's)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(
        handles, names, loc="outside upper left", ncols=5 if len(budgets) > 1 else 3, borderpad=0
    )
    return finish(fig, table, caption)


def _over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, for each system and budget that could be made."""
    made = table.dropna(subset="mean")
    by = ["family", "system", "macs_asked"]
    return made.groupby(by, sort=False).mean(numeric_only=True).reset_index()


def _frontier(known: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The dense model, and of each budget the system that saves MACs and keeps most."""
    saving = known[known["reduces_macs"] > 0]
    best = saving.loc[saving.groupby("macs_asked")["mean"].idxmax()]
    points = best.sort_values("macs_reduction")[["macs_reduction", "mean"]].to_numpy()
    return tuple(100 * np.vstack([[0, 1], points]).T)


def _draw(ax: Axes, rows: pd.DataFrame, *, shift: float = 0.0, **look: object) -> None:
    rows = rows.sort_values("macs_reduction")
    ax.plot(100 * rows["macs_reduction"] + shift, 100 * rows["mean"], **look)


def _draw_family(ax: Axes, family: pd.DataFrame) -> None:
    systems = list(family["system"].drop_duplicates())
    places = np.linspace(-_APART / 2, _APART / 2, len(systems)) if len(systems) > 1 else [0.0]
    for place, system, marker, colour in zip(
        places, systems, _MARKERS, style.PALETTE, strict=False
    ):
        rows = family[family["system"] == system]
        saves = bool((rows["reduces_macs"] > 0).all())
        hollow = {} if saves else {"mfc": "white", "mec": colour, "mew": 1.2}
        x = 100 * rows["macs_reduction"] + place
        ax.vlines(x, 100 * rows["low"], 100 * rows["high"], color=colour, lw=2.2, alpha=0.4)
        label = _short(system) + ("" if saves else " (cannot reduce MACs)")
        look = {"color": colour, "marker": marker, "label": label, "zorder": 3}
        _draw(ax, rows, shift=place, **_LINE | look | hollow)
    ax.legend(loc="lower left", fontsize=6.5, handlelength=1.8, borderpad=0.2)


def _short(system: str) -> str:
    """The system's name without its family's."""
    for separator in (": ", ", "):
        head, found, rest = system.partition(separator)
        if found:
            return rest
    return head


def _draw_controls(ax: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))
    static = 100 * rows["static_pruning"].max()
    ax.axvline(static, color=style.GREY, lw=1.2, zorder=0, label="best static pruning")
    ax.hlines(
        places, 100 * rows["low"], 100 * rows["high"], color=style.PALETTE[0], lw=3, alpha=0.3
    )
    colours = (style.PALETTE[0], style.PALETTE[2], style.PALETTE[1], style.INK)
    for (column, (label, marker)), colour in zip(_CONTROLS.items(), colours, strict=True):
        look = {"color": colour, "ls": "", "marker": marker, "mew": 1.4, "ms": 5.5}
        ax.plot(100 * rows[column], places, label=label, **look)
    ax.set_xlim(-3, 106)
    ax.grid(visible=False, axis="y")
