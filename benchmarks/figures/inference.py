"""How much faster than their dense model systems are, against what their MACs promise."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from moee_analysis.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Look = dict[str, Any]  # colour and marker of a system

_MARKERS = "osD^vPX"
_LINE = {"lw": 1.4, "ms": 4.8, "mec": "white", "mew": 0.5}
_PROMISED = {"lw": 1.2, "ls": ":"}
_DENSE = {"color": style.GREY, "lw": 1}
_PANEL, _LEGEND = (2.7, 2.9), 2.0  # inches; of the legend the width
_APART = 0.45  # of a doubling of the batch, between the first and the last system


@style.house
def inference(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw speed-up against batch size: a panel for each number of threads, a line for each system.

    Dotted lines are what the MACs promise, 1 is the dense model. Systems stand a little apart, so
    that none hides the quartiles of another.

    Parameters
    ----------
    table
        One row for each system, batch size and number of threads: ``system``, ``batch``,
        ``threads``, ``speedup``, ``speedup_low`` and ``speedup_high`` (quartiles), ``promised``.
        Rows of the system ``dense`` are left out: they are the 1.
    """
    others = table[table["system"] != "dense"]
    threads = sorted(table["threads"].unique().tolist())
    fig, panels = style.panels(len(threads), cols=3, size=_PANEL, sharex=True, sharey=True)
    fig.set_figwidth(fig.get_figwidth() + _LEGEND)
    looks = _looks(others["system"])
    for ax, count in zip(panels, threads, strict=True):
        _draw_panel(ax, others[others["threads"] == count], looks)
        ax.set(title=f"{count} thread{'s' * (count > 1)}", xlabel="batch (images)")
    _mark_batches(panels[0], table["batch"].unique())
    fig.supylabel("speed-up (dense time / time)")
    _legend(fig, looks)
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw_panel(ax: Axes, table: pd.DataFrame, looks: dict[str, _Look]) -> None:
    ax.axhline(1, **_DENSE, zorder=1)
    places = np.linspace(-_APART / 2, _APART / 2, len(looks)) if len(looks) > 1 else [0.0]
    for (system, look), place in zip(looks.items(), places, strict=True):
        rows = table[table["system"] == system].sort_values("batch")
        x = rows["batch"].to_numpy(float) * 2**place
        ax.vlines(
            x, rows["speedup_low"], rows["speedup_high"], color=look["color"], lw=2.2, alpha=0.4
        )
        ax.plot(x, rows["speedup"], zorder=4, **look, **_LINE)
        for promised in rows.loc[rows["promised"] > 1, "promised"].unique():
            ax.axhline(promised, color=look["color"], zorder=2, **_PROMISED)


def _mark_batches(ax: Axes, batches: np.ndarray) -> None:
    """Batches on a scale of doublings, each by its number of images."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_xlim(batches.min() / 2**_APART, batches.max() * 2**_APART)
    ax.minorticks_off()


def _looks(systems: pd.Series) -> dict[str, _Look]:
    """Colour and marker of every system, in order of appearance."""
    pairs = zip(style.colours(systems).items(), cycle(_MARKERS), strict=False)
    return {system: {"color": colour, "marker": marker} for (system, colour), marker in pairs}


def _legend(fig: Figure, looks: dict[str, _Look]) -> None:
    """Name the systems beside the panels."""
    lines = {system: Line2D([], [], **look, **_LINE) for system, look in looks.items()}
    lines["promised by the MACs"] = Line2D([], [], color=style.INK, **_PROMISED)
    lines["dense model"] = Line2D([], [], **_DENSE)
    fig.legend([*lines.values()], [*lines], loc="outside right center", handlelength=2.6)
