"""Where the time of an extraction goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moee_analysis.plots import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (3.3, 2.9)  # inches


@style.house
def extraction_time(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw what each stage takes, stacked, in plain forward passes; a panel for each recipe.

    Parameters
    ----------
    table
        One row for each recipe, number of images and stage: ``recipe``, ``images``, ``stage``,
        ``passes``.
    """
    recipes = list(dict.fromkeys(table["recipe"]))
    fig, axes = style.panels(len(recipes), size=_PANEL)
    colours = style.colours(s for s in table["stage"] if s != "other") | {"other": style.GREY}
    for ax, recipe in zip(axes, recipes, strict=True):
        _draw(ax, table[table["recipe"] == recipe], colours)
        ax.set(title=f"recipe {recipe}", xlabel="calibration images")
    axes[0].set_ylabel("time (plain forward passes)")
    handles = {h.get_label(): h for ax in axes for h in ax.containers}
    ordered = [handles[name] for name in colours if name in handles]
    fig.legend(handles=ordered, loc="outside right upper")
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    heights = table.pivot_table(index="images", columns="stage", values="passes", fill_value=0.0)
    places, bottom = np.arange(len(heights)), np.zeros(len(heights))
    for stage in (name for name in colours if name in heights):
        ax.bar(places, heights[stage], 0.62, bottom=bottom, color=colours[stage], label=stage)
        bottom += heights[stage].to_numpy()
    for place, total in zip(places, bottom, strict=True):
        ax.annotate(f"{total:.1f}", (place, total), (0, 2), textcoords="offset points", ha="center")
    ax.set_xticks(places, [str(images) for images in heights.index])
    ax.margins(y=0.1)
