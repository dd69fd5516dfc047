"""The look of every figure: one palette, one set of sizes, captions that fit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.textpath import TextPath

PALETTE: tuple[str, ...] = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # green
    "#CC79A7",  # purple
    "#E69F00",  # orange
    "#56B4E9",  # sky
    "#000000",  # black
    "#F0E442",  # yellow
)
"""The colours of Okabe and Ito, safe for colour-blind readers; the best on white come first."""

GREY = "#8A8F98"
"""For what is only there to compare with: the dense model, chance, a bound."""

INK = "#2B2F36"
"""Text and axes."""

sequential = "viridis"
"""Colour map of a quantity that starts at zero."""

diverging = "RdBu_r"
"""Colour map of a quantity with a neutral middle; draw it with ``TwoSlopeNorm``."""

LAYER_AXIS = "layer (counted from 0, as timm's blocks.0)"

HOUSE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),
    "grid.color": "#E4E6EA",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.labelsize": 9,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
}

house = plt.rc_context(HOUSE)
"""Decorator of every plotting function: draw with the house settings, then restore them."""

_CAPTION_POINTS = 7.5
_CAPTION_LINE = _CAPTION_POINTS * 1.35 / 72  # inches
_LABEL_LINE = 0.2  # inches, of a label that all panels share


def figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches and its axes, as ``plt.subplots`` gives them.

    The figure is already closed: pyplot forgets it, so a notebook shows it once, where it is
    returned, and a thousand of them fill no memory. ``options`` go to ``plt.subplots``.
    """
    with plt.rc_context(HOUSE):
        fig, axes = plt.subplots(rows, cols, figsize=(width, height), **options)
        plt.close(fig)
    return fig, axes


def panels(
    count: int, *, cols: int = 4, size: tuple[float, float] = (2.3, 1.8), **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` small multiples of ``size`` inches, row by row, and their axes.

    At most ``cols`` stand side by side; places left over in the last row stay empty. The lowest
    panel of every column has tick labels, also with ``sharex``.
    """
    count = max(1, count)
    cols = min(cols, count)
    rows = math.ceil(count / cols)
    fig, grid = figure(size[0] * cols, size[1] * rows, rows, cols, squeeze=False, **options)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for lowest in axes[max(0, count - cols) : count]:
        lowest.tick_params(labelbottom=True)
    return fig, axes[:count]


def stacked(width: float, heights: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """A closed figure of ``width`` inches, and its parts of these ``heights``, from above."""
    with plt.rc_context(HOUSE):
        fig = plt.figure(figsize=(width, sum(heights)))
        parts = fig.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
        plt.close(fig)
    return fig, list(parts[:, 0])


@house
def caption(fig: Figure, text: str | None) -> Figure:
    """Write ``text`` small and grey below ``fig``, wrapped to its width; ``None`` writes nothing.

    The figure grows by the height of the caption, so the axes keep their size.
    """
    if not text:
        return fig
    width, height = fig.get_size_inches()
    wrapped = _wrapped(text, width)
    room = _CAPTION_LINE * (len(wrapped) + 1)
    _make_room(fig, room)
    fig.text(
        0.06 / width,
        0.05 / (height + room),
        "\n".join(wrapped),
        size=_CAPTION_POINTS,
        color="#6B7078",
        va="bottom",
        linespacing=1.25,
    )
    return fig


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of a caption no longer than ``width`` inches, by the mean width of its letters."""
    letter = TextPath((0, 0), text, size=_CAPTION_POINTS).get_extents().width / len(text)
    return textwrap.wrap(text, width=max(10, int(0.95 * width * 72 / letter)))


def _make_room(fig: Figure, room: float) -> None:
    """Add ``room`` inches below everything that is in ``fig``."""
    width, height = fig.get_size_inches()
    fig.set_size_inches(width, height + room)
    label = fig.get_supxlabel()
    bottom = (room + (_LABEL_LINE if label else 0)) / (height + room)
    layout = fig.get_layout_engine()
    if layout is not None:
        layout.set(rect=(0, bottom, 1, 1 - bottom))
    if label:  # the layout would put it at the very bottom, below the caption
        with plt.rc_context(HOUSE):
            fig.supxlabel(label, y=room / (height + room))


def sequential_colours(count: int) -> list[str]:
    """``count`` colours, dark to light, for things with an order (layers, experts by size)."""
    colours = mpl.colormaps[sequential]
    return [to_hex(colours(0.88 * place / max(1, count - 1))) for place in range(count)]


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for every name in order of appearance; the dense model is always grey.

    More names than the palette can tell apart get an ordered colour map instead.
    """
    unique: Sequence[str] = list(dict.fromkeys(names))
    others = [name for name in unique if name.lower() != "dense"]
    choice = PALETTE if len(others) < len(PALETTE) else sequential_colours(len(others))
    given = dict(zip(others, choice, strict=False))
    return {name: given.get(name, GREY) for name in unique}


def layer_label(index: int) -> str:
    """``layer 5``: how a layer is called in a panel's title, counted from 0."""
    return f"layer {index}"
