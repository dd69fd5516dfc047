"""How evenly the experts are used: sorted routing shares, and what sums them up."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import style

_NAMES = {
    "entropy": "normalised entropy H / ln E\n(1 is even)",
    "gini": "Gini coefficient\n(0 is even)",
    "max_over_mean": "largest / mean share\n(1 is even)",
    "cv2": "CV² of the shares\n(0 is even)",
    "dead": "experts never used",
}


@style.house
def routing(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.routing``, of one or several systems: one panel for each layer.

    The experts of a layer stand in order of use. Systems differ in their number of experts E, so
    their steps have width 1 / E and height E times the share: every area is 1, and a perfectly
    even routing is the grey line at 1.
    """
    layers = sorted(table["layer"].unique())
    colours = style.colours(table["system"])
    opacity = 0.12 if len(colours) == 1 else 0.0  # overlapping areas would only mix
    fig, axes = style.panels(len(layers), size=(2.0, 1.7), sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        ax.axhline(1, color=style.GREY, lw=1, zorder=1)
        for system, part in table[table["layer"] == layer].groupby("system", sort=False):
            _draw_steps(ax, part.sort_values("rank"), colours[system], opacity)
        ax.set_title(style.layer_label(layer))
        ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"])
    axes[0].set_ylim(bottom=0)
    fig.supxlabel("experts, most used first (rank / E)")
    fig.supylabel("share × E (1 is even)")
    _legend(fig, axes[0])
    return style.caption(fig, caption or _facts(table))


@style.house
def balance(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.balance``, of one or several systems: one panel for each metric.

    Lines are systems over the layers, bands the 95 % intervals.
    """
    metrics = list(dict.fromkeys(table["metric"]))
    colours = style.colours(table["system"])
    fig, axes = style.panels(len(metrics), cols=3, size=(2.6, 2.0), sharex=True)
    for ax, metric in zip(axes, metrics, strict=True):
        for system, part in table[table["metric"] == metric].groupby("system", sort=False):
            _draw_band(ax, part.sort_values("layer"), colours[system], system)
        ax.set_title(_NAMES.get(metric, metric))
        _set_range(ax, metric)
    fig.supxlabel(style.LAYER_AXIS)
    _legend(fig, axes[0])
    return style.caption(fig, caption or _facts(table, bands=table["low"].notna().any()))


def _draw_steps(ax: Axes, experts: pd.DataFrame, colour: str, opacity: float) -> None:
    count = len(experts)
    edges = np.arange(count + 1) / count
    heights = count * experts["share"].to_numpy()
    ax.stairs(heights, edges, color=colour, lw=1.5, label=experts["system"].iloc[0], zorder=3)
    ax.stairs(heights, edges, color=colour, fill=True, alpha=opacity, zorder=2)


def _draw_band(ax: Axes, layers: pd.DataFrame, colour: str, system: str) -> None:
    x = layers["layer"]
    ax.fill_between(x, layers["low"], layers["high"], color=colour, alpha=0.2, lw=0)
    ax.plot(x, layers["value"], color=colour, marker="o", ms=3, label=system)


def _set_range(ax: Axes, metric: str) -> None:
    """Every metric from its own zero or one; layers and experts are whole numbers."""
    low, high = ax.get_ylim()
    if metric == "entropy":
        ax.set_ylim(low, 1 + 0.03 * (1 - low))
    else:
        ax.set_ylim(0, max(1.0, high) if metric in ("dead", "max_over_mean") else high)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=metric == "dead")


def _legend(fig: Figure, ax: Axes) -> None:
    """The systems above the panels; the caption names a single one."""
    handles, names = ax.get_legend_handles_labels()
    if len(names) > 1:
        fig.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), borderpad=0)


def _facts(table: pd.DataFrame, *, bands: bool = False) -> str:
    systems = [
        f"{name}: {_span(part['n_experts'])} experts, k = {_span(part['k'])}"
        for name, part in table.groupby("system", sort=False)
    ]
    interval = "; bands are basic 95 % intervals of the image bootstrap" if bands else ""
    return f"{table['n_images'].max()} images{interval}. " + "; ".join(systems) + "."


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low} to {high}"
