"""What a router costs beside the best one possible, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, legend_above, plain_log, whole_layers

_COLOURS = [colour for colour in style.PALETTE if colour != "#F0E442"]
_MARKERS = "osD^vP*"
_SHARE = "% of the output's variance"


@style.house
def router_regret(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.router_regret``: a line for every router over the layers.

    Left the error under each router, right what of it a better choice of experts could save.
    """
    fig, (left, right) = style.figure(7.2, 2.7, 1, 2)
    for name, rows in table.groupby("router", sort=False):
        look = router_looks(table)[name]
        left.plot(rows["layer"], 100 * rows["error"], ms=4, label=name, **look)
    left.set(yscale="log", title="squared error of the output", ylabel=_SHARE)
    plain_log(left.yaxis, subs=(1, 3))
    whole_layers(left)
    draw_regret(right, table)
    right.set(title="regret: error beyond the best expert's", xlabel="", ylabel="")
    fig.supxlabel(style.LAYER_AXIS)
    legend_above(fig, left, columns=5)
    return finish(fig, table, caption)


def draw_regret(ax: Axes, table: pd.DataFrame) -> None:
    """Draw the regret of every router that has any; the best one possible has none."""
    for name, rows in table.groupby("router", sort=False):
        if (rows["regret"] > 0).any():
            ax.plot(rows["layer"], 100 * rows["regret"], ms=3.5, **router_looks(table)[name])
    ax.set(yscale="log", title="regret of the routers", xlabel="layer", ylabel=_SHARE)
    plain_log(ax.yaxis, subs=(1, 3))
    whole_layers(ax)


def router_looks(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Colour and marker of every router of a table."""
    names = dict.fromkeys(table["router"])
    return {
        name: {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
        }
        for place, name in enumerate(names)
    }
