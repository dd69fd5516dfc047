"""Several figures on one sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from moee_analysis.errors import MoeeError
from moee_analysis.plots import style

WIDTH = 9.6
"""Inches that figures may take side by side."""

_GAP = 0.12  # inches


def sheet(figures: Sequence[Figure], *, caption: str | None = None) -> Figure:
    """Put finished figures on one, side by side as long as there is room, in their order.

    They are pictures there: their axes cannot be changed any more.

    Raises
    ------
    MoeeError
        No figure.
    """
    if not figures:
        raise MoeeError("figures for a sheet", "none", "pass at least one")
    dpi = style.HOUSE["figure.dpi"]
    pictures = [_drawn(fig, dpi) for fig in figures]
    widest = max(picture.width for picture in pictures) + _GAP * dpi
    lines = math.ceil(len(pictures) / max(1, int(WIDTH * dpi // widest)))
    columns = math.ceil(len(pictures) / lines)  # lines of equal length, as far as they can be
    lines = [pictures[at : at + columns] for at in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in line) + round(_GAP * dpi) for line in lines]
    page = Image.new("RGB", (round(columns * widest), sum(heights)), "white")
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            page.paste(picture, (round(column * widest), sum(heights[:row])))
    return style.caption(_shown(page, dpi), caption)


def _drawn(fig: Figure, dpi: int) -> Image.Image:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return Image.open(buffer).convert("RGB")


def _shown(page: Image.Image, dpi: int) -> Figure:
    """A figure of the size of ``page`` that holds nothing else."""
    fig, ax = style.figure(page.width / dpi, page.height / dpi)
    fig.get_layout_engine().set(w_pad=0, h_pad=0)
    ax.set_axis_off()
    ax.imshow(page, interpolation="nearest", aspect="auto")
    return fig
