"""How time and memory of clustering grow with the number of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moee_analysis.plots import style
from moee_analysis.plots.drawing import plain_log

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX"
_LINE = {"lw": 1.4, "ms": 4.8, "mec": "white", "mew": 0.5}
_PANEL = (3.3, 2.9)  # inches


@style.house
def clustering_time(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw seconds and largest memory against the number of tokens, a line for each system.

    Parameters
    ----------
    table
        One row for each system and size: ``system``, ``tokens``, ``seconds``, ``peak_gb`` (decimal
        gigabytes) and ``exponent``, that of the tokens in the system's seconds (nan: unknown).
    """
    fig, (time, memory) = style.panels(2, size=_PANEL)
    _draw(time, table, "seconds")
    _draw(memory, table, "peak_gb")
    time.set(ylabel="time (s)", title="time", yscale="log")
    plain_log(time.yaxis, subs=(1, 3))
    memory.set(ylabel="largest memory (GB)", title="memory of the whole process", ylim=(0, None))
    time.legend(loc="lower right")
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw(ax: Axes, table: pd.DataFrame, column: str) -> None:
    colours = style.colours(table["system"])
    systems = table.sort_values("tokens", kind="stable").groupby("system", sort=False)
    for (system, rows), marker in zip(systems, _MARKERS, strict=False):
        look = {"color": colours[system], "marker": marker, "label": _named(system, rows)}
        ax.plot(rows["tokens"], rows[column], **look, **_LINE)
    sizes = table["tokens"].unique()
    ax.set(xscale="log", xlabel="tokens")
    ax.set_xticks(sizes, [f"{size / 1000:g}k" for size in sizes])
    ax.minorticks_off()


def _named(system: str, rows: pd.DataFrame) -> str:
    exponent = rows["exponent"].iloc[0]
    return system if math.isnan(exponent) else f"{system}: n^{exponent:.2f}"
