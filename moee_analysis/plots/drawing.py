"""What several figures are drawn with: heat maps, lines with bands, colours of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moee_analysis.plots import style

NOISE = "#D5D8DD"
"""Tokens in no cluster."""

WHITE_TO_BLUE = LinearSegmentedColormap.from_list(
    "white_to_blue", ["#FFFFFF", "#B5D6EA", style.PALETTE[0], "#00263D"]
)
"""Colour map of a share of which most cells have little."""

_HUES = tuple(colour for colour in style.PALETTE if colour != "#000000")
_MIXTURES = (("#FFFFFF", 0.0), ("#FFFFFF", 0.55), ("#000000", 0.5), ("#777777", 0.6))


def expert_colours(count: int) -> list[str]:
    """``count`` colours for experts: the palette, then its hues lighter, darker and dull.

    Up to seven are safe for colour-blind readers; beyond that a figure also writes numbers.
    """
    every = [_mixed(hue, *mixture) for mixture in _MIXTURES for hue in _HUES]
    return [every[place % len(every)] for place in range(count)]


def patch_experts(
    ax: Axes, picture: np.ndarray, experts: np.ndarray, colours: Sequence[str]
) -> None:
    """Lay the colours of patches' experts (rows, columns) over a pale grey picture."""
    height, width = picture.shape[:2]
    ax.imshow(picture.mean(axis=2), cmap="gray", vmin=-255, vmax=255)  # pale
    ax.imshow(
        experts, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, alpha=0.68,
        interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip


def part_masks(axes: Sequence[Axes], masks: Sequence[np.ndarray]) -> dict[int, str]:
    """Draw part masks, one on each of ``axes``; return the colours of parts, largest part first."""
    pixels = np.bincount(np.concatenate([mask.ravel() for mask in masks]))
    present = np.argsort(-pixels, kind="stable")[: np.count_nonzero(pixels)]
    place = np.zeros(len(pixels), dtype=np.int64)
    place[present] = np.arange(len(present))
    colours = expert_colours(len(present))
    for ax, mask in zip(axes, masks, strict=False):
        ax.imshow(
            place[mask], cmap=ListedColormap(colours), vmin=-0.5, vmax=len(present) - 0.5,
            interpolation="nearest",
        )  # fmt: skip
    return dict(zip(present.tolist(), colours, strict=True))


def number(ax: Axes, x: float, y: float, text: str, *, size: float = 7) -> None:
    """Write ``text`` at a place of a picture, readable on every colour."""
    halo = [withStroke(linewidth=2, foreground="white")]
    ax.text(x, y, text, size=size, ha="center", va="center", color=style.INK, path_effects=halo)


def square(table: pd.DataFrame, value: str, name: str) -> tuple[np.ndarray, list[str]]:
    """Values of a table of ordered pairs as a matrix in its ``order_a``, and the names in order.

    ``name`` is the column of names without its ``_a``.
    """
    matrix = table.pivot(index="order_a", columns="order_b", values=value).to_numpy()
    first = table.drop_duplicates("order_a").sort_values("order_a")
    return matrix, [str(one) for one in first[f"{name}_a"]]


def heat_map(ax: Axes, matrix: np.ndarray, **options: Any) -> AxesImage:
    """Draw ``matrix`` without grid and frame; ``options`` go to ``imshow``."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax.imshow(matrix, interpolation="nearest", **options)


def name_cells(
    ax: Axes, rows: Sequence[str] = (), columns: Sequence[str] = (), *, size: float = 6.5
) -> None:
    """Write the names of rows and columns of a heat map; without names there are no ticks."""
    ax.set_yticks(range(len(rows)), rows, size=size)
    upright = max((len(name) for name in columns), default=0) <= 2
    ax.set_xticks(range(len(columns)), columns, size=size, rotation=0 if upright else 90)


def thinned(names: Sequence[str], *, most: int = 11) -> list[str]:
    """Leave out names between so many that they would touch; their places stay."""
    step = -(-len(names) // most)
    return [name if place % step == 0 else "" for place, name in enumerate(names)]


def line(ax: Axes, layers: pd.DataFrame, value: str, **options: Any) -> None:
    """Draw ``value`` over the layers with its interval (``low``, ``high``) as a band."""
    layers = layers.sort_values("layer")
    x = layers["layer"]
    ax.fill_between(x, layers["low"], layers["high"], color=options["color"], alpha=0.18, lw=0)
    ax.plot(x, layers[value], **{"marker": "o", "ms": 3.5} | options)


def bar_beside(fig: Figure, axes: Sequence[Axes], image: AxesImage, label: str) -> None:
    """Draw one colour bar for all of ``axes``."""
    bar = fig.colorbar(image, ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.set_label(label, size=8)
    bar.outline.set_visible(False)


def panel_title(system: str, layer: int, *, several: bool) -> str:
    """Name a panel by its layer, and by its system where there are ``several``."""
    label = style.layer_label(layer)
    return f"{system}, {label}" if several else label


def whole_layers(ax: Axes) -> None:
    """Put ticks at whole layers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain_log(axis: Axis, *, subs: tuple[float, ...] = (1,)) -> None:
    """Write the ticks of a logarithmic axis as plain numbers, at ``subs`` times powers of 10."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend_above(fig: Figure, ax: Axes, *, columns: int = 4) -> None:
    """Write the legend of ``ax`` above the figure."""
    handles, names = ax.get_legend_handles_labels()
    fig.legend(
        handles, names, loc="outside upper left", ncols=min(columns, len(names)), borderpad=0
    )


def finish(fig: Figure, table: pd.DataFrame, caption: str | None) -> Figure:
    """Write ``caption`` below, or else the one that the measure gave its table."""
    return style.caption(fig, caption or table.attrs.get("caption"))


def _mixed(colour: str, other: str, share: float) -> str:
    """``colour`` with a ``share`` of ``other`` in it."""
    pairs = zip(to_rgb(colour), to_rgb(other), strict=True)
    return to_hex([(1 - share) * one + share * two for one, two in pairs])
