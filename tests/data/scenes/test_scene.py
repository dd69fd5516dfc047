"""The bundled data set: what a user may rely on."""

from functools import cache

import numpy as np
import pytest

from moee_analysis.data.scenes import scene as scenes
from moee_analysis.data.scenes.canvas import PARTS, Canvas, Pose
from moee_analysis.data.scenes.scene import CLASSES, FAMILIES

SIGNATURES = {
    "goldfish": "body fin tail eye", "pug": "fur ear eye muzzle", "cat": "fur ear eye muzzle",
    "owl": "body eye wing", "plane": "body wing tail", "helicopter": "body rotor tail window",
    "cliff": "rock", "volcano": "rock lava", "fire_engine": "cab wheel body ladder",
    "garbage_truck": "cab wheel hopper", "pickup": "cab wheel body bed",
    "tow_truck": "cab wheel bed boom", "school_bus": "body window wheel", "sailboat": "hull cloth",
    "house": "wall roof window", "lighthouse": "wall roof lamp", "windmill": "wall roof rotor",
    "tent": "cloth", "palm": "trunk foliage", "mushroom": "stem cap",
}  # fmt: skip
SAMPLE = 30


@cache
def parts_seen(name: str) -> dict[str, float]:
    """Share of a class's scenes in which each part shows."""
    label = CLASSES.index(name)
    masks = [scenes.render(1, index, label=label).parts for index in range(SAMPLE)]
    return {part: np.mean([value in mask for mask in masks]) for value, part in enumerate(PARTS)}


def test_a_scene_is_a_function_of_seed_and_index():
    forwards = [scenes.render(3, index) for index in range(4)]
    backwards = [scenes.render(3, index) for index in reversed(range(4))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.parts.tobytes() == other.parts.tobytes()
    assert (scenes.render(4, 0).image != forwards[0].image).any()
    assert len(set(scenes.SPLIT_SEEDS.values())) == len(scenes.SPLIT_SEEDS)


def test_scenes_are_pictures_with_part_masks_and_any_run_of_them_is_balanced():
    drawn = scenes.render(scenes.SPLIT_SEEDS["evaluation"], 7)
    assert drawn.image.shape == (64, 64, 3)
    assert drawn.parts.shape == (64, 64)
    assert drawn.image.dtype == drawn.parts.dtype == np.uint8
    assert drawn.parts.max() < len(PARTS)
    assert drawn.label == 7
    labels = [scenes.render(5, index).label for index in range(13, 13 + len(CLASSES))]
    assert sorted(labels) == list(range(len(CLASSES)))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_shows_its_signature_parts(name):
    seen = parts_seen(name)
    assert not {part: seen[part] for part in SIGNATURES[name].split() if seen[part] < 0.8}


def test_trucks_share_cab_and_wheels_and_differ_in_fittings():
    trucks = [parts_seen(name) for name, family in FAMILIES.items() if family == "truck"]
    assert len(trucks) == 4
    fittings = ["body", "ladder", "hopper", "bed", "boom"]
    usual = {frozenset(part for part in fittings if seen[part] > 0.8) for seen in trucks}
    assert len(usual) == len(trucks)
    assert all(seen[part] > 0.8 for seen in trucks for part in ("cab", "wheel"))


def test_mask_and_picture_are_painted_together():
    canvas = Canvas()
    with canvas.posed(Pose(0.5, 0.5, 0.25, angle=0.4, stretch=-0.8)):
        canvas.disc("wheel", (200, 0, 0), 0.2, 0.1, 0.6)
        canvas.line("pole", (200, 0, 0), (-1, -1), (1, 1), width=0.1)
    painted = canvas.picture()[..., 0] > 100
    marked = canvas.parts() != 0
    assert (painted != marked).mean() < 0.02
    assert marked.mean() > 0.05
