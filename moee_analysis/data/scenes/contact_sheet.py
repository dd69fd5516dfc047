"""The contact sheet: every class at a glance, with its name and a part mask."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moee_analysis.data.scenes.canvas import PARTS, SIDE, Colour, shaded

COLUMNS = 10
GAP = 4
PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 45)

_SURROUNDINGS: dict[str, Colour] = {
    "sky": (238, 240, 243), "cloud": (250, 250, 252), "ground": (205, 205, 207),
    "grass": (192, 199, 194), "water": (180, 193, 206), "hill": (220, 222, 226),
    "occluder": (90, 90, 95),
}  # fmt: skip
_SAFE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def part_colours() -> np.ndarray:
    """A colour for each of `PARTS`, uint8 [parts, 3].

    Surroundings are grey; the parts of objects take the colours of Okabe and Ito, which people
    with any colour vision tell apart, in lighter and darker rounds.
    """
    rounds = (1.0, 0.62, 1.3, 0.4, 0.8)
    colours, used = [], 0
    for name in PARTS:
        if name in _SURROUNDINGS:
            colours.append(_SURROUNDINGS[name])
        else:
            colours.append(shaded(_SAFE[used % len(_SAFE)], rounds[used // len(_SAFE)]))
            used += 1
    return np.array(colours, dtype=np.uint8)


def sheet(names: list[str], columns: list[list[Image.Image]], *, zoom: int) -> Image.Image:
    """Lay out one column of pictures under each name, in bands of ten columns."""
    cell, head = SIDE * zoom + GAP, 11 * zoom + GAP
    band = head + cell * len(columns[0]) + 2 * GAP
    bands = -(-len(names) // COLUMNS)
    page = Image.new("RGB", (cell * min(COLUMNS, len(names)) + GAP, band * bands), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=9 * zoom)
    for index, (name, column) in enumerate(zip(names, columns, strict=True)):
        x, y = GAP + cell * (index % COLUMNS), band * (index // COLUMNS)
        pen.text((x + cell // 2, y + head // 2), name, fill=INK, font=font, anchor="mm")
        for row, picture in enumerate(column):
            page.paste(_zoomed(picture, zoom), (x, y + head + row * cell))
    return page


def _zoomed(picture: Image.Image, zoom: int) -> Image.Image:
    return picture.resize((SIDE * zoom, SIDE * zoom), Image.Resampling.NEAREST)


def coloured(parts: np.ndarray) -> Image.Image:
    """A part mask as a picture."""
    return Image.fromarray(part_colours()[parts])
