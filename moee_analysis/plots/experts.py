"""What the experts are made of: their sizes, their neurons, and what they share."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moee_analysis.plots import drawing, style

_KEPT = ListedColormap(["#F1F2F4", style.PALETTE[0]])


@style.house
def layers(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.layers``: experts, noise, and the neurons that are left.

    A layer that stayed dense has a cross in place of its experts.
    """
    fig, (left, middle, right) = style.figure(8.4, 2.4, 1, 3, sharex=True)
    dense = table[~table["converted"]]
    left.bar(table["index"], table["experts"], color=style.PALETTE[0])
    left.plot(dense["index"], np.zeros(len(dense)), "x", color=style.INK)
    left.set(ylabel="experts", title="clusters that became experts")
    middle.bar(table["index"], table["noise_share"], color=style.GREY)
    middle.set(ylabel="share of clustered tokens", title="noise", ylim=(0, 1))
    right.bar(table["index"], table["union_fraction"], color=style.GREY, label="stored")
    right.bar(table["index"], table["active_fraction"], color=style.PALETTE[2], label="active")
    right.set(ylabel="share of hidden neurons", title="neurons left", ylim=(0, 1))
    drawing.legend_above(fig, right)
    for ax in (left, middle, right):
        drawing.whole_layers(ax)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    return drawing.finish(fig, table, caption)


@style.house
def sizes(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.sizes``: a dot per expert, its area its share of the tokens.

    The dash is what a token uses on average, the grey bar what the layer stores.
    """
    systems = list(dict.fromkeys(table["system"]))
    fig, axes = style.panels(len(systems), cols=1, size=(6.2, 2.7), sharex=True, sharey=True)
    colours = style.colours(systems)
    for ax, system in zip(axes, systems, strict=True):
        _draw_sizes(ax, table[table["system"] == system], colours[system])
        ax.set_title(system)
        drawing.whole_layers(ax)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_ylim(0, 1.03)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    fig.supylabel("hidden neurons kept", size=9)
    drawing.legend_above(fig, axes[0])
    return drawing.finish(fig, table, caption)


@style.house
def neurons(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.neurons``: experts by neurons, a panel per layer.

    Neurons that many experts keep stand left; those at the right, kept by none, are deleted.
    """
    groups = list(table.groupby(["system", "layer"], sort=False))
    several = table["system"].nunique() > 1
    heights = [0.4 + 0.11 * part["expert"].nunique() for _, part in groups]
    fig, axes = style.figure(
        7.0, sum(heights) + 0.4, len(groups), 1, squeeze=False, height_ratios=heights
    )
    for ax, ((system, layer), part) in zip(axes[:, 0], groups, strict=True):
        kept = part.pivot(index="expert", columns="order", values="kept").to_numpy()
        drawing.heat_map(ax, kept, cmap=_KEPT, vmin=0, vmax=1, aspect="auto")
        names = drawing.thinned([str(expert) for expert in range(len(kept))], most=8)
        drawing.name_cells(ax, names)
        ax.hlines(np.arange(1, len(kept)) - 0.5, -0.5, kept.shape[1] - 0.5, color="white", lw=0.7)
        title = drawing.panel_title(system, layer, several=several)
        ax.set_title(f"{title}: {kept.shape[1]} hidden neurons")
        ax.set_ylabel("expert")
    axes[-1, 0].set_xlabel("hidden neuron, kept by most experts first")
    return drawing.finish(fig, table, caption)


@style.house
def overlap(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.overlap``: a heat map per layer.

    Above the diagonal stands the Jaccard index of two experts' neurons, below it the one to
    expect of random subsets of their sizes.
    """
    groups = list(table.groupby(["system", "layer"], sort=False))
    several = table["system"].nunique() > 1
    fig, axes = style.panels(len(groups), cols=4, size=(1.9, 2.0))
    for ax, ((system, layer), part) in zip(axes, groups, strict=True):
        found, expected = (
            part.pivot(index="expert_a", columns="expert_b", values=value).to_numpy()
            for value in ("jaccard", "expected_jaccard")
        )
        both = np.triu(found, 1) + np.tril(expected, -1)
        np.fill_diagonal(both, np.nan)
        image = drawing.heat_map(ax, both, cmap=drawing.WHITE_TO_BLUE, vmin=0, vmax=1)
        names = drawing.thinned([str(expert) for expert in range(len(both))])
        drawing.name_cells(ax, names, names, size=6)
        ax.set_title(drawing.panel_title(system, layer, several=several))
    drawing.bar_beside(fig, axes, image, "Jaccard: ◥ found, ◣ random")
    return drawing.finish(fig, table, caption)


def _draw_sizes(ax: Axes, experts: pd.DataFrame, colour: str) -> None:
    layers = experts.drop_duplicates("layer")
    ax.bar(layers["layer"], layers["union"], width=0.7, color="#ECEEF1", label="kept by any expert")
    spread = experts.groupby("layer")["expert"].transform(_side_by_side)
    ax.scatter(
        experts["layer"] + spread, experts["fraction"], s=4 + 320 * experts["share"], color=colour,
        alpha=0.65, lw=0, label="an expert (area: share of tokens)",
    )  # fmt: skip
    ax.hlines(
        layers["active"], layers["layer"] - 0.35, layers["layer"] + 0.35, color=style.INK, lw=1.8,
        label="used by a token on average",
    )  # fmt: skip
    ax.grid(visible=False, axis="x")


def _side_by_side(experts: pd.Series) -> np.ndarray:
    """Sideways places that keep the dots of one layer apart."""
    return (np.arange(len(experts)) + 0.5) / len(experts) * 0.6 - 0.3
