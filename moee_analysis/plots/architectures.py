"""Several architectures side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish, legend_above

_TITLES = {
    "experts": "experts", "active": "hidden neurons in use (%)", "evenness": "evenness of use",
    "class": "class explains (% of entropy)", "similarity": "cosine of mean inputs",
    "part": "mutual information with parts",
}  # fmt: skip
_PERCENT = ("active", "class")
_MARKERS = "osD^vPX"


@style.house
def architectures(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.architectures``: a panel per quantity, a line per model.

    The models' layers are laid over each other by their relative depth. Dotted lines are what
    chance gives.
    """
    shown = [name for name in _TITLES if name in set(table["quantity"])]
    fig, panels = style.panels(len(shown), cols=3, size=(2.5, 2.0), sharex=True)
    colours = style.colours(table["model"])
    for ax, quantity in zip(panels, shown, strict=True):
        scale = 100 if quantity in _PERCENT else 1
        for marker, (model, colour) in zip(_MARKERS, colours.items(), strict=False):
            chosen = (table["model"] == model) & (table["quantity"] == quantity)
            rows = table[chosen].sort_values("depth")
            x = 100 * rows["depth"]
            ax.plot(
                x, scale * rows["value"], color=colour, marker=marker, ms=3.5, label=model, lw=1.3
            )
            if rows["chance"].notna().any():
                ax.plot(x, scale * rows["chance"], color=colour, ls=":", lw=1.1)
        ax.set(title=_TITLES[quantity], xlim=(0, 100))
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    fig.supxlabel("depth (% of the layers, the first at the left)")
    legend_above(fig, panels[0])
    return finish(fig, table, caption)


@style.house
def architecture_variants(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.architecture_variants``: retention, a group of marks per model."""
    known = table[(table["variant"] != "dense") & table["retention"].notna()]
    models = list(dict.fromkeys(table["model"]))
    variants = list(dict.fromkeys(known["variant"]))
    fig, ax = style.figure(1.6 + 1.7 * len(models), 3.0)
    colours = style.colours(variants)
    places = np.linspace(-0.32, 0.32, len(variants)) if len(variants) > 1 else [0.0]
    looks = zip(variants, places, _MARKERS * len(variants), strict=False)
    for variant, place, marker in looks:
        rows = known[known["variant"] == variant]
        x = rows["model"].map(models.index).to_numpy(float) + place
        _draw(ax, x, rows, color=colours[variant], marker=marker, label=variant)
    ax.axhline(100, color=style.GREY, lw=1, zorder=0)
    ax.set_xticks(range(len(models)), models)
    ax.set_xlim(-0.5, len(models) - 0.5)
    ax.grid(visible=False, axis="x")
    ax.set(ylabel="dense top-1 retained (%)")
    legend_above(fig, ax, columns=3)
    return finish(fig, table, caption)


def _draw(ax: Axes, x: np.ndarray, rows: pd.DataFrame, **look: str) -> None:
    low, high = (100 * rows[name] for name in ("retention_low", "retention_high"))
    ax.vlines(x, low, high, color=look["color"], lw=2.2, alpha=0.4)
    ax.plot(x, 100 * rows["retention"], ls="", ms=5.5, mec="white", mew=0.5, **look)
