"""The bundled data set: rendered scenes of 20 classes, with a mask of every pixel's part.

A scene is a function of a seed and an index, so the set needs no files and has no end. Object,
pose, colours, place, clutter, occlusion, light and noise are drawn independently of each other;
only the usual place and the usual paint lean towards the class, as they do in photographs. Where
a scene shows objects of two classes, the larger one, in front, gives the label.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import PIL

from moee_analysis.data.scenes import nature, vehicles
from moee_analysis.data.scenes.backgrounds import OCCLUDERS, PLACES, draw_clutter, draw_sky
from moee_analysis.data.scenes.canvas import SIDE, Canvas, Draws, Pose

_LAND = ("open", "street", "meadow")
_COAST = ("open", "meadow", "sea")


@dataclass(frozen=True)
class _Kind:
    """How a class is drawn, the family it belongs to, and the places it is usually found in."""

    draw: Callable[[Canvas, Draws], None]
    family: str
    places: tuple[str, ...]
    rolls: float = 0.2


_KINDS: dict[str, _Kind] = {
    "goldfish": _Kind(nature.draw_goldfish, "animal", ("under_water",), 0.5),
    "pug": _Kind(nature.draw_pug, "animal", _LAND),
    "cat": _Kind(nature.draw_cat, "animal", _LAND),
    "owl": _Kind(nature.draw_owl, "animal", ("air", "meadow", "open")),
    "plane": _Kind(vehicles.draw_plane, "aircraft", ("air", "open", "sea"), 0.5),
    "helicopter": _Kind(vehicles.draw_helicopter, "aircraft", ("air", "open", "sea"), 0.4),
    "cliff": _Kind(nature.draw_cliff, "landscape", _COAST, 0.1),
    "volcano": _Kind(nature.draw_volcano, "landscape", _COAST, 0.1),
    "fire_engine": _Kind(vehicles.draw_fire_engine, "truck", _LAND),
    "garbage_truck": _Kind(vehicles.draw_garbage_truck, "truck", _LAND),
    "pickup": _Kind(vehicles.draw_pickup, "truck", _LAND),
    "tow_truck": _Kind(vehicles.draw_tow_truck, "truck", _LAND),
    "school_bus": _Kind(vehicles.draw_school_bus, "bus", _LAND),
    "sailboat": _Kind(vehicles.draw_sailboat, "boat", ("sea",)),
    "house": _Kind(nature.draw_house, "building", _LAND),
    "lighthouse": _Kind(nature.draw_lighthouse, "building", _COAST),
    "windmill": _Kind(nature.draw_windmill, "building", _COAST),
    "tent": _Kind(nature.draw_tent, "building", _LAND),
    "palm": _Kind(nature.draw_palm, "plant", _COAST),
    "mushroom": _Kind(nature.draw_mushroom, "plant", ("meadow", "open")),
}

CLASSES: tuple[str, ...] = tuple(_KINDS)  # a scene's label is an index into them
FAMILIES: dict[str, str] = {name: kind.family for name, kind in _KINDS.items()}

# A scene belongs to exactly one split
SPLIT_SEEDS: dict[str, int] = {"train": 11, "calibration": 22, "evaluation": 44}
SPLIT_SIZES: dict[str, int] = {"train": 40_000, "calibration": 2_000, "evaluation": 2_000}

USUAL_PLACE = 0.5  # how often a class is found where one expects it; else it is anywhere
SCALES = (0.18, 0.42)  # half an object's width, in pictures
BYSTANDERS = 0.5  # how often a smaller object of another class stands behind
BYSTANDER_SHARES = (0.4, 0.65)  # a bystander's size, relative to the object's
OCCLUDER_COUNTS = (0, 0, 1, 1, 2)
_RAMP = np.linspace(-1, 1, SIDE, dtype=np.float32)


@dataclass(frozen=True)
class Scene:
    """A scene: uint8 [64, 64, 3] RGB, index into `CLASSES`, uint8 [64, 64] into `canvas.PARTS`."""

    image: np.ndarray
    label: int
    parts: np.ndarray


@cache
def edition() -> str:
    """Hash of all that a scene is a function of beside its split and index: code and libraries."""
    code = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = f"numpy {np.__version__}, pillow {PIL.__version__}"
    return hashlib.sha256(b"".join([*code, versions.encode()])).hexdigest()


def render(seed: int, index: int, *, label: int | None = None) -> Scene:
    """Render one scene, a function of its arguments alone; ``seed`` and ``index`` are not negative.

    Labels follow the index in turn, so that any run of consecutive scenes is balanced, unless the
    ``label`` of another class is given.
    """
    label = index % len(CLASSES) if label is None else label
    rng, canvas = Draws(np.random.default_rng([seed, index])), Canvas()
    _compose(canvas, rng, _KINDS[CLASSES[label]])
    return Scene(_expose(canvas.picture(), rng), label, canvas.parts())


def _compose(canvas: Canvas, rng: Draws, kind: _Kind) -> None:
    """Paint from back to front: sky, place, clutter, bystander, object, occluders."""
    draw_sky(canvas, rng)
    place = rng.choice(kind.places if rng.chance(USUAL_PLACE) else tuple(PLACES))
    draw_clutter(canvas, rng, PLACES[place](canvas, rng))
    pose = _draw_pose(rng, kind, rng.uniform(*SCALES))
    if rng.chance(BYSTANDERS):
        other = rng.choice([one for one in _KINDS.values() if one is not kind])
        with canvas.posed(_draw_pose(rng, other, pose.scale * rng.uniform(*BYSTANDER_SHARES))):
            other.draw(canvas, rng)
    with canvas.posed(pose):
        kind.draw(canvas, rng)
    for _ in range(rng.choice(OCCLUDER_COUNTS)):
        rng.choice(OCCLUDERS)(canvas, rng)


def _draw_pose(rng: Draws, kind: _Kind, scale: float) -> Pose:
    return Pose(
        x=rng.uniform(scale * 0.7, 1 - scale * 0.7),
        y=rng.uniform(0.42, 0.68),
        scale=scale,
        angle=rng.uniform(-kind.rolls, kind.rolls),
        stretch=rng.uniform(0.65, 1.05) * rng.choice((-1, 1)),
    )


def _expose(picture: np.ndarray, rng: Draws) -> np.ndarray:
    """The photograph: a gradient of light, a colour cast, contrast and sensor noise."""
    across, down = rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)
    light = 1 + across * _RAMP[None, :, None] + down * _RAMP[:, None, None]
    cast = np.array([rng.uniform(0.85, 1.15) for _ in range(3)], dtype=np.float32)
    contrast, level = rng.uniform(0.5, 1.1), rng.uniform(-25, 25)
    noise = rng.generator.standard_normal(picture.shape, dtype=np.float32)
    picture = (picture * light * cast - 128) * contrast + 128 + level
    picture += noise * rng.uniform(3, 20)
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)
