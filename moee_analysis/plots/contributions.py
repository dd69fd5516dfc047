"""What groups of experts on slots add to the tokens, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, whole_layers

_PANELS = {
    "contribution": "length added",
    "relative": "over length of whole output",
    "mass": "share of combine weights",
}


@style.house
def contributions(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.contributions``: a panel per quantity, a line per group.

    A column ``seed`` gives every line the range over the seeds as a band; panels whose column is
    not in the table are left out.
    """
    shown = {name: title for name, title in _PANELS.items() if name in table}
    fig, panels = style.panels(len(shown), cols=3, size=(2.5, 2.3))
    for ax, (value, title) in zip(panels, shown.items(), strict=True):
        for (group, rows), colour in zip(
            table.groupby("group", sort=False), style.PALETTE, strict=False
        ):
            by_layer = rows.groupby("layer")[value].agg(["mean", "min", "max"])
            ax.fill_between(
                by_layer.index, by_layer["min"], by_layer["max"], color=colour, alpha=0.18, lw=0
            )
            ax.plot(by_layer.index, by_layer["mean"], "o-", ms=3.5, color=colour, label=group)
        ax.set(title=title, xlabel="layer, from 0")
        ax.set_ylim(bottom=0)
        whole_layers(ax)
    panels[0].legend()
    return finish(fig, table, caption)
