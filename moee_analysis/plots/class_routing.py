"""How classes are routed: the paper's Figures 3 and 4, and what stands behind them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style

_ALL_BARS = "#C6CAD1"
_NULL_BAND = "#E9EBEE"
_HOLLOW = {"ls": "", "marker": "o", "ms": 3.5, "mfc": "white", "zorder": 3}


@style.house
def class_routing(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.class_routing``: a row per layer, a column per class.

    A class's share of each expert stands in colour before that of all classes in grey. The
    experts of a layer are in the same order everywhere: most used by all classes first.
    """
    names = list(dict.fromkeys(table["class_name"]))
    rows = list(dict.fromkeys(zip(table["system"], table["layer"], strict=True)))
    colours = style.colours(names)
    width = max(1.5, 0.35 + 0.1 * table["expert"].nunique())
    fig, grid = style.figure(
        width * len(names) + 0.5, 1.35 * len(rows) + 0.4, len(rows), len(names),
        squeeze=False, sharey="row",
    )  # fmt: skip
    several = table["system"].nunique() > 1
    for axes, (system, layer) in zip(grid, rows, strict=True):
        part = table[(table["system"] == system) & (table["layer"] == layer)]
        for ax, name in zip(axes, names, strict=True):
            _draw_shares(ax, part[part["class_name"] == name], colours[name])
        label = style.layer_label(layer)
        axes[0].set_ylabel(f"{system}\n{label}" if several else label)
    for ax, name in zip(grid[0], names, strict=True):
        ax.set_title(name)
    fig.supxlabel("expert, most used by all classes first", size=9)
    fig.supylabel("share of tokens", size=9)
    _legend_of_bars(fig, grid[0, 0])
    return drawing.finish(fig, table, caption)


@style.house
def specificity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.specificity``: divergence over the layers, a panel per system.

    Thin lines are classes, the thick one is their mean, the grey band what permuted labels reach
    (95 %). The dashed line is the mean without its bias, with the interval.
    """
    systems = list(dict.fromkeys(table["system"]))
    colours = style.colours(systems)
    size = (4.4 if len(systems) == 1 else 3.6, 2.7)
    fig, axes = style.panels(len(systems), cols=3, size=size, sharex=True, sharey=True)
    for ax, system in zip(axes, systems, strict=True):
        part = table[table["system"] == system]
        _draw_classes(ax, part[part["class_index"] >= 0], colours[system])
        _draw_mean(ax, part[part["class_index"] < 0].sort_values("layer"), colours[system])
        ax.set_title(system)
        drawing.whole_layers(ax)
        ax.set_ylim(bottom=0)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    fig.supylabel("divergence from all classes (bits)", size=9)
    drawing.legend_above(fig, axes[0], columns=2 if len(systems) == 1 else 3)
    return drawing.finish(fig, table, caption)


@style.house
def class_information(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.class_information``: a line per system over the layers.

    Bias is removed; bands are intervals, hollow dots do not exceed permuted labels (p >= 0.05).
    """
    colours = style.colours(table["system"])
    fig, ax = style.figure(4.8, 2.9)
    for system, part in table.groupby("system", sort=False):
        drawing.line(ax, part, "corrected", color=colours[system], label=system)
        chance = part[part["p"] >= 0.05]
        ax.plot(chance["layer"], chance["corrected"], **_HOLLOW, mec=colours[system])
    ax.set(xlabel=style.LAYER_AXIS, ylabel="I(class; expert) / H(expert),\nbias removed")
    ax.set_ylim(bottom=0)
    drawing.whole_layers(ax)
    ax.plot([], [], **_HOLLOW, mec=style.GREY, label="no more than permuted labels")
    drawing.legend_above(fig, ax)
    return drawing.finish(fig, table, caption)


def _draw_shares(ax: Axes, experts: pd.DataFrame, colour: str) -> None:
    experts = experts.sort_values("share_all", ascending=False, kind="stable")
    x = np.arange(len(experts))
    ax.bar(x, experts["share_all"], width=0.92, color=_ALL_BARS)
    ax.bar(x, experts["share"], width=0.5, color=colour)
    ax.set_xticks(x, drawing.thinned([str(e) for e in experts["expert"]], most=24), size=5.5)
    ax.tick_params(axis="x", length=0, pad=1)
    ax.grid(visible=False, axis="x")
    ax.margins(x=0.01)


def _legend_of_bars(fig: Figure, ax: Axes) -> None:
    one, other = ax.containers[1], ax.containers[0]
    fig.legend(
        [other[0], one[0]], ["all classes", "the class"], loc="outside upper right", ncols=2,
        borderpad=0,
    )  # fmt: skip


def _draw_classes(ax: Axes, classes: pd.DataFrame, colour: str) -> None:
    ends = []
    for name, part in classes.groupby("class_name", sort=False):
        layers = part.sort_values("layer")
        ax.plot(layers["layer"], layers["js"], color=colour, lw=0.7, alpha=0.35)
        ends.append((layers["js"].iloc[-1], layers["layer"].iloc[-1], name))
    for height, layer, name in (max(ends), min(ends)) if len(ends) > 1 else ends:
        ax.annotate(
            name, (layer, height), (3, 0), textcoords="offset points", size=6.5, va="center",
            color=style.GREY, annotation_clip=False,
        )  # fmt: skip


def _draw_mean(ax: Axes, mean: pd.DataFrame, colour: str) -> None:
    ax.fill_between(
        mean["layer"], 0, mean["null_high"], color=_NULL_BAND, lw=0, label="permuted labels, 95 %"
    )
    ax.plot(mean["layer"], mean["js"], color=colour, lw=2.4, label="mean over classes")
    drawing.line(ax, mean, "corrected", color=colour, lw=1.2, ls="--", label="bias removed, 95 %")
