"""What the scenes are drawn with: seeded draws, a pose, and a canvas for picture and mask."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")

PARTS: tuple[str, ...] = (  # a pixel of value 10 in a part mask belongs to a PARTS[10], a wheel
    "sky", "cloud", "ground", "grass", "water", "hill", "foliage", "trunk", "rock", "pole",
    "wheel", "cab", "window", "body", "ladder", "hopper", "bed", "boom", "lamp",
    "fur", "ear", "eye", "muzzle", "tail", "fin", "beak", "wing", "engine", "rotor",
    "wall", "roof", "door", "cloth", "hull", "cap", "stem", "lava", "occluder",
)  # fmt: skip
PART_VALUES: dict[str, int] = {name: value for value, name in enumerate(PARTS)}
SIDE = 64  # height and width of a finished picture in pixels
SUPERSAMPLING = 2  # pictures are painted so many times larger and averaged down: smooth edges
PIXELS = SIDE * SUPERSAMPLING

_ANGLES = [2 * math.pi * step / 18 for step in range(18)]
_UNIT_CIRCLE = [(math.cos(angle), math.sin(angle)) for angle in _ANGLES]


class Draws:
    """Random draws from one generator, taken in blocks because single NumPy draws are slow."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self._pool: list[float] = []

    def unit(self) -> float:
        """One number from [0, 1)."""
        if not self._pool:
            self._pool = self.generator.random(128).tolist()
        return self._pool.pop()

    def uniform(self, low: float, high: float) -> float:
        """One number from [low, high)."""
        return low + (high - low) * self.unit()

    def integer(self, low: int, high: int) -> int:
        """One whole number from low to high, both included."""
        return low + int((high - low + 1) * self.unit())

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.unit() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, each as likely."""
        return options[int(len(options) * self.unit())]

    def near(self, colour: Colour, spread: float = 22) -> Colour:
        """A colour near the given one: a shift in lightness and a smaller one per channel."""
        light, third = self.uniform(-spread, spread), spread / 3
        return tuple(_clip(c + light + self.uniform(-third, third)) for c in colour)

    def near_one(self, colours: Sequence[Colour], spread: float = 22) -> Colour:
        """A colour near one of those given."""
        return self.near(self.choice(colours), spread)

    def colour(self) -> Colour:
        """Any colour, neither black nor white."""
        return tuple(self.integer(25, 230) for _ in range(3))


def _clip(value: float) -> int:
    return max(0, min(255, int(value)))


def shaded(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    return tuple(_clip(c * factor) for c in colour)


@dataclass(frozen=True)
class Pose:
    """Where an object stands: its own frame, about [-1, 1] x [-1, 1] with y down, to the picture.

    Its centre and half its width (``scale``) are in pictures (0 is left or top, 1 right or bottom),
    its ``angle`` in radians; ``stretch`` is its width by its height, negative to mirror it.
    """

    x: float
    y: float
    scale: float
    angle: float = 0.0
    stretch: float = 1.0

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Points of the object's frame on the canvas, in pixels."""
        cos, sin = (PIXELS * self.scale * turn(self.angle) for turn in (math.cos, math.sin))
        a, b, left, top = cos * self.stretch, sin * self.stretch, self.x * PIXELS, self.y * PIXELS
        return [(a * x - sin * y + left, b * x + cos * y + top) for x, y in points]


WHOLE = Pose(0.0, 0.0, 1.0)


class Canvas:
    """A picture and its part mask, painted together: every shape fills the same pixels in both."""

    def __init__(self) -> None:
        self._image = Image.new("RGBA", (PIXELS, PIXELS))  # the mask is the fourth channel
        self._paint = ImageDraw.Draw(self._image)
        self._pose = WHOLE

    @contextmanager
    def posed(self, pose: Pose) -> Iterator[None]:
        """Paint in an object's own frame; outside, coordinates are in pictures, 0 to 1."""
        self._pose = pose
        try:
            yield
        finally:
            self._pose = WHOLE

    def polygon(self, part: str, colour: Colour, *points: Point) -> None:
        """A filled polygon."""
        self._paint.polygon(self._pose.place(points), fill=(*colour, PART_VALUES[part]))

    def pair(self, part: str, colour: Colour, *points: Point) -> None:
        """A polygon on the right and its mirror image on the left, which is painted first."""
        self.polygon(part, colour, *((-x, y) for x, y in points))
        self.polygon(part, colour, *points)

    def box(self, part: str, colour: Colour, *sides: float) -> None:
        """A filled box, given its left, top, right and bottom."""
        x0, y0, x1, y1 = sides
        self.polygon(part, colour, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def ellipse(self, part: str, colour: Colour, *measures: float) -> None:
        """A filled ellipse, given its centre x, y and its half axes."""
        x, y, rx, ry = measures
        self.polygon(part, colour, *((x + rx * cos, y + ry * sin) for cos, sin in _UNIT_CIRCLE))

    def disc(self, part: str, colour: Colour, x: float, y: float, radius: float) -> None:
        """A filled circle around (x, y)."""
        self.ellipse(part, colour, x, y, radius, radius)

    def line(self, part: str, colour: Colour, *points: Point, width: float) -> None:
        """A line of the given width, at least one pixel of the finished picture."""
        pixels = max(SUPERSAMPLING, round(width * (PIXELS * self._pose.scale)))
        fill = (*colour, PART_VALUES[part])
        self._paint.line(self._pose.place(points), fill=fill, width=pixels)

    def picture(self) -> np.ndarray:
        """The picture at its final size, float32 [64, 64, 3], 0 to 255."""
        return np.asarray(self._image.convert("RGB").reduce(SUPERSAMPLING), dtype=np.float32)

    def parts(self) -> np.ndarray:
        """The part mask at its final size, uint8 [64, 64], values index `PARTS`."""
        return np.asarray(self._image)[::SUPERSAMPLING, ::SUPERSAMPLING, 3].copy()
