"""The look of every figure: seaborn's theme, colours for colour-blind readers too, captions."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.textpath import TextPath

# Okabe and Ito: blue, vermilion, green, purple, orange, sky, black, yellow; the best on white first
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
INK = "#2B2F36"  # text and axes
GREY = "#8A8F98"  # what is only there to compare with: the dense model, chance, a bound
PALE = "#C9CDD3"  # what stands behind: all classes, other systems, tokens in no cluster
FAINT = "#E9EBEE"  # areas behind everything

SEQUENTIAL = "viridis"  # a quantity that starts at zero
DIVERGING = "RdBu_r"  # a quantity with a neutral middle
SHARES = sns.blend_palette(["#FFFFFF", "#B5D6EA", PALETTE[0], "#00263D"], as_cmap=True)

INTERVAL = {"lw": 2.2, "alpha": 0.4}
REFERENCE = {"color": GREY, "lw": 1, "zorder": 0}
LAYER_AXIS = "layer (counted from 0, as timm's blocks.0)"

HOUSE: dict[str, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=0.93),
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a class may be called $x$
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # no plot has ticks there, and looking for them takes half of the drawing
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#E4E6EA",
    "legend.frameon": False,
    "patch.force_edgecolor": False,
    "lines.linewidth": 1.6,
    "figure.labelsize": 9,
}

house = plt.rc_context(HOUSE)  # decorator of every plot: the user's own settings come back after it

_CAPTION = 7.5  # points
_LINE = _CAPTION * 1.35 / 72  # inches, of a caption
_LABEL = 0.2  # inches, of a label that all panels share


@house
def figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches and its axes, as ``plt.subplots`` gives them."""
    fig, axes = plt.subplots(rows, cols, figsize=(width, height), **options)
    plt.close(fig)  # a notebook shows it once, where it is returned
    return fig, axes


def panels(
    count: int, *, cols: int = 4, size: tuple[float, float] = (2.3, 1.8), **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` small multiples of ``size`` inches, row by row, and their axes."""
    count = max(1, count)
    cols = min(cols, count)
    rows = math.ceil(count / cols)
    fig, grid = figure(size[0] * cols, size[1] * rows, rows, cols, squeeze=False, **options)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for lowest in axes[max(0, count - cols) : count]:
        lowest.tick_params(labelbottom=True)  # also with sharex
    return fig, axes[:count]


@house
def stack_parts(width: float, heights: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """A closed figure of ``width`` inches, and its parts of these ``heights``, from above."""
    fig = plt.figure(figsize=(width, sum(heights)))
    parts = fig.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    plt.close(fig)
    return fig, list(parts[:, 0])


@house
def caption(fig: Figure, text: str | None) -> Figure:
    """Write ``text`` below ``fig``, which grows: the axes keep their size. None writes nothing."""
    if not text:
        return fig
    width, height = fig.get_size_inches()
    letter = TextPath((0, 0), text, size=_CAPTION).get_extents().width / len(text)  # the mean
    lines = textwrap.wrap(text, width=max(10, int(0.95 * width * 72 / letter)))
    room, label = _LINE * (len(lines) + 1), fig.get_supxlabel()
    total = height + room
    bottom = (room + (_LABEL if label else 0)) / total
    fig.set_size_inches(width, total)
    if fig.get_layout_engine() is not None:
        fig.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    if label:  # the layout would put it at the very bottom, below the caption
        fig.supxlabel(label, y=room / total)
    look = {"size": _CAPTION, "color": "#6B7078", "va": "bottom", "linespacing": 1.25}
    fig.text(0.06 / width, 0.05 / total, "\n".join(lines), **look)
    return fig


def colours(names: Iterable[str]) -> dict[str, str]:
    """Colours of names in order: dense grey, others of the palette, many of an ordered map."""
    unique = list(dict.fromkeys(names))
    others = [name for name in unique if name.lower() != "dense"]
    many = len(others) >= len(PALETTE)
    choice = sns.color_palette(SEQUENTIAL, len(others)).as_hex() if many else PALETTE
    given = dict(zip(others, choice, strict=False))
    return {name: given.get(name, GREY) for name in unique}


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of every name in order of appearance."""
    pairs = zip(colours(names).items(), cycle(MARKERS), strict=False)
    return {name: {"color": colour, "marker": marker} for (name, colour), marker in pairs}


def expert_colours(count: int) -> list[str]:
    """``count`` colours for experts, by hue and shade; up to seven tell apart for all eyes."""
    mixtures = (("white", 0.0), ("white", 0.55), ("black", 0.5), ("#777777", 0.6))
    every = [
        to_hex((1 - share) * np.array(to_rgb(hue)) + share * np.array(to_rgb(other)))
        for other, share in mixtures
        for hue in PALETTE
        if hue != "#000000"
    ]
    return [every[place % len(every)] for place in range(count)]
