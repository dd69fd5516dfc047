"""The bundled data set: rendered scenes of 20 classes, with a mask of every pixel's part.

A scene is a function of a seed and an index, so the set needs no files and has no end. Object,
pose, colours, place, clutter, occlusion, light and noise are drawn independently of each other;
only the usual place and the usual paint lean towards the class, as they do in photographs. Where
a scene shows objects of two classes, the larger one, in front, gives the label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moee_analysis.data.scenes import nature, vehicles
from moee_analysis.data.scenes.backgrounds import OCCLUDERS, PLACES, draw_clutter, draw_sky
from moee_analysis.data.scenes.canvas import PARTS, SIDE, Canvas, Draws, Pose
from moee_analysis.data.scenes.contact_sheet import coloured, sheet
from moee_analysis.errors import MoeeError

__all__ = [
    "CLASSES",
    "FAMILIES",
    "PARTS",
    "SPLIT_SEEDS",
    "SPLIT_SIZES",
    "Scene",
    "contact_sheet",
    "render",
    "scene",
]

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

CLASSES: tuple[str, ...] = tuple(_KINDS)
"""Class names; a scene's label is an index into them."""

FAMILIES: dict[str, str] = {name: kind.family for name, kind in _KINDS.items()}
"""Family of each class. The trucks share cab and wheels and differ in body and fittings."""

SPLIT_SEEDS: dict[str, int] = {"train": 11, "calibration": 22, "evaluation": 44}
"""Seed of each split; a scene belongs to exactly one."""

SPLIT_SIZES: dict[str, int] = {"train": 40_000, "calibration": 2_000, "evaluation": 2_000}
"""Scenes of each split."""


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes
    ----------
    image
        uint8 [64, 64, 3], RGB.
    label
        Index into `CLASSES`.
    parts
        uint8 [64, 64]; each value indexes `PARTS`.
    """

    image: np.ndarray
    label: int
    parts: np.ndarray


def scene(split: str, index: int) -> Scene:
    """Scene ``index`` of a split.

    Raises
    ------
    MoeeError
        If there is no such split or it has no such index.
    """
    if split not in SPLIT_SEEDS:
        raise MoeeError(f"a split among {', '.join(SPLIT_SEEDS)}", repr(split), "name one of them")
    size = SPLIT_SIZES[split]
    if not 0 <= index < size:
        raise MoeeError(f"an index from 0 to {size - 1}", str(index), f"'{split}' ends there")
    return render(SPLIT_SEEDS[split], index)


def render(seed: int, index: int, *, label: int | None = None) -> Scene:
    """Render one scene, a function of its arguments alone.

    Labels follow the index in turn, so that any run of consecutive scenes is balanced.

    Parameters
    ----------
    seed, index
        Non-negative; together they seed the scene's own random generator.
    label
        Index of another class to draw instead of the one whose turn it is.
    """
    label = index % len(CLASSES) if label is None else label
    draws = Draws(np.random.default_rng([seed, index]))
    canvas = Canvas()
    _compose(canvas, draws, _KINDS[CLASSES[label]])
    return Scene(_exposed(canvas.picture(), draws), label, canvas.parts())


def _compose(canvas: Canvas, draws: Draws, kind: _Kind) -> None:
    """Paint from back to front: sky, place, clutter, bystander, object, occluders."""
    draw_sky(canvas, draws)
    usual = draws.chance(USUAL_PLACE)
    place = draws.choice(kind.places if usual else tuple(PLACES))
    horizon = PLACES[place](canvas, draws)
    draw_clutter(canvas, draws, horizon)
    pose = _pose(draws, kind, draws.uniform(*SCALES))
    if draws.chance(BYSTANDERS):
        other = draws.choice([one for one in _KINDS.values() if one is not kind])
        share = draws.uniform(*BYSTANDER_SHARES)
        _stand(canvas, draws, other, _pose(draws, other, pose.scale * share))
    _stand(canvas, draws, kind, pose)
    for _ in range(draws.choice(OCCLUDER_COUNTS)):
        draws.choice(OCCLUDERS)(canvas, draws)


USUAL_PLACE = 0.5
"""How often a class is found where one expects it; else it is anywhere."""

SCALES = (0.18, 0.42)
"""Half an object's width, in pictures."""

BYSTANDERS = 0.5
"""How often a smaller object of another class stands behind the one that gives the label."""

BYSTANDER_SHARES = (0.4, 0.65)
"""A bystander's size, relative to the object's."""

OCCLUDER_COUNTS = (0, 0, 1, 1, 2)


def _stand(canvas: Canvas, draws: Draws, kind: _Kind, pose: Pose) -> None:
    with canvas.posed(pose):
        kind.draw(canvas, draws)


def _pose(draws: Draws, kind: _Kind, scale: float) -> Pose:
    return Pose(
        x=draws.uniform(scale * 0.7, 1 - scale * 0.7),
        y=draws.uniform(0.42, 0.68),
        scale=scale,
        angle=draws.uniform(-kind.rolls, kind.rolls),
        stretch=draws.uniform(0.65, 1.05) * draws.choice((-1, 1)),
    )


def _exposed(picture: np.ndarray, draws: Draws) -> np.ndarray:
    """The photograph: a gradient of light, a colour cast, contrast and sensor noise."""
    across, down = draws.uniform(-0.35, 0.35), draws.uniform(-0.35, 0.35)
    light = 1 + across * _RAMP[None, :, None] + down * _RAMP[:, None, None]
    cast = np.array([draws.uniform(0.85, 1.15) for _ in range(3)], dtype=np.float32)
    contrast, level = draws.uniform(0.5, 1.1), draws.uniform(-25, 25)
    noise = draws.generator.standard_normal(picture.shape, dtype=np.float32)
    picture = (picture * light * cast - 128) * contrast + 128 + level
    picture += noise * draws.uniform(3, 20)
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)


_RAMP = np.linspace(-1, 1, SIDE, dtype=np.float32)


def contact_sheet(split: str = "evaluation", *, rows: int = 4, zoom: int = 2) -> Image.Image:
    """One column per class: its name, ``rows`` scenes, and the part mask of the last one."""
    columns = []
    for label in range(len(CLASSES)):
        drawn = [scene(split, row * len(CLASSES) + label) for row in range(rows)]
        pictures = [Image.fromarray(one.image) for one in drawn]
        columns.append([*pictures, coloured(drawn[-1].parts)])
    return sheet([name.replace("_", " ") for name in CLASSES], columns, zoom=zoom)
