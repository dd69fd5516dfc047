"""The bundled data set and the bundled model: what a user may rely on."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from moee_analysis import scenes, scenes_evaluation, scenes_training
from moee_analysis.errors import MoeeError
from moee_analysis.paths import data_folder
from moee_analysis.scenes import CLASSES, FAMILIES, PARTS
from moee_analysis.scenes_drawing import Canvas, Draws, Pose

SIGNATURES = {
    "goldfish": {"body", "fin", "tail", "eye"},
    "pug": {"fur", "ear", "eye", "muzzle"},
    "cat": {"fur", "ear", "eye", "muzzle"},
    "owl": {"body", "eye", "wing"},
    "plane": {"body", "wing", "tail"},
    "helicopter": {"body", "rotor", "tail", "window"},
    "cliff": {"rock"},
    "volcano": {"rock", "lava"},
    "fire_engine": {"cab", "wheel", "body", "ladder"},
    "garbage_truck": {"cab", "wheel", "hopper"},
    "pickup": {"cab", "wheel", "body", "bed"},
    "tow_truck": {"cab", "wheel", "bed", "boom"},
    "school_bus": {"body", "window", "wheel"},
    "sailboat": {"hull", "cloth"},
    "house": {"wall", "roof", "window"},
    "lighthouse": {"wall", "roof", "lamp"},
    "windmill": {"wall", "roof", "rotor"},
    "tent": {"cloth"},
    "palm": {"trunk", "foliage"},
    "mushroom": {"stem", "cap"},
}
TRUCKS = [name for name, family in FAMILIES.items() if family == "truck"]
SAMPLE = 30


@cache
def parts_seen(name: str) -> dict[str, float]:
    """Share of a class's scenes in which each part shows."""
    label = CLASSES.index(name)
    masks = [scenes.render(1, index, label=label).parts for index in range(SAMPLE)]
    return {part: np.mean([value in mask for mask in masks]) for value, part in enumerate(PARTS)}


def test_a_scene_is_a_function_of_seed_and_index():
    forwards = [scenes.render(3, index) for index in range(6)]
    backwards = [scenes.render(3, index) for index in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.parts.tobytes() == other.parts.tobytes()
    assert (scenes.render(4, 0).image != forwards[0].image).any()


def test_scenes_are_pictures_with_part_masks():
    drawn = scenes.scene("evaluation", 7)
    assert drawn.image.shape == (64, 64, 3)
    assert drawn.parts.shape == (64, 64)
    assert drawn.image.dtype == drawn.parts.dtype == np.uint8
    assert drawn.parts.max() < len(PARTS)
    assert drawn.label == 7


def test_classes_cover_what_the_notebooks_name():
    assert {"goldfish", "pug", "plane", "cliff"} <= set(CLASSES)
    assert {"fire_engine", "garbage_truck", "pickup", "tow_truck"} == set(TRUCKS)
    assert len(CLASSES) >= 16
    assert set(SIGNATURES) == set(CLASSES)


def test_any_run_of_scenes_is_balanced():
    labels = [scenes.render(5, index).label for index in range(13, 13 + 2 * len(CLASSES))]
    assert set(np.bincount(labels)) == {2}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_shows_its_signature_parts(name):
    seen = parts_seen(name)
    missing = {part: seen[part] for part in SIGNATURES[name] if seen[part] < 0.8}
    assert not missing


def test_trucks_share_cab_and_wheels_and_differ_in_fittings():
    fittings = ["body", "ladder", "hopper", "bed", "boom"]
    usual = {
        name: frozenset(part for part in fittings if parts_seen(name)[part] > 0.8)
        for name in TRUCKS
    }
    assert len(set(usual.values())) == len(TRUCKS)
    assert all(parts_seen(name)[part] > 0.8 for name in TRUCKS for part in ("cab", "wheel"))


def test_splits_share_no_picture():
    pictures = [
        scenes.scene(split, index).image.tobytes()
        for split in scenes.SPLIT_SEEDS
        for index in range(60)
    ]
    assert len(set(pictures)) == len(pictures)
    assert len(set(scenes.SPLIT_SEEDS.values())) == len(scenes.SPLIT_SEEDS)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("evaluation", 2000), ("train", -1)])
def test_a_scene_that_does_not_exist_says_what_does(split, index):
    with pytest.raises(MoeeError, match="What to do"):
        scenes.scene(split, index)


def test_mask_and_picture_are_painted_together():
    canvas = Canvas()
    with canvas.posed(Pose(0.5, 0.5, 0.25, angle=0.4, stretch=-0.8)):
        canvas.disc("wheel", (200, 0, 0), 0.2, 0.1, 0.6)
        canvas.line("pole", (200, 0, 0), ((-1, -1), (1, 1)), 0.1)
    painted = canvas.picture()[..., 0] > 100
    marked = canvas.parts() != 0
    assert (painted != marked).mean() < 0.02
    assert marked.mean() > 0.05


def test_a_canvas_forgets_the_pose_when_drawing_fails():
    canvas = Canvas()
    with pytest.raises(KeyError), canvas.posed(Pose(0.5, 0.5, 0.1)):
        canvas.box("no such part", (1, 2, 3), -1, -1, 1, 1)
    canvas.box("rock", (1, 2, 3), 0, 0, 1, 1)
    assert (canvas.parts() == PARTS.index("rock")).all()


def test_draws_stay_in_their_ranges():
    draws = Draws(np.random.default_rng(0))
    numbers = [draws.integer(2, 4) for _ in range(300)]
    assert set(numbers) == {2, 3, 4}
    assert all(-1 <= draws.uniform(-1, 2) < 2 for _ in range(300))
    assert all(0 <= c <= 255 for _ in range(100) for c in draws.near((250, 5, 128), 60))


def test_contact_sheet_has_a_column_for_every_class():
    sheet = scenes.contact_sheet(rows=1, zoom=1)
    assert sheet.mode == "RGB"
    assert sheet.width > 64 * len(CLASSES) // 2


# The bundled model


@pytest.fixture(scope="module")
def card():
    return json.loads((data_folder() / "bundled.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(card):
    built = VisionTransformer(**card["kwargs"])
    built.load_state_dict(load_file(data_folder() / "bundled.safetensors"))
    return built.eval()


@pytest.fixture(scope="module")
def evaluation():
    return scenes_evaluation.rendered("evaluation", 400)


def test_the_stored_model_is_small():
    assert (data_folder() / "bundled.safetensors").stat().st_size <= 8e6


def test_the_card_tells_how_the_model_came_about(card):
    assert card["kwargs"] == scenes_training.ARCHITECTURE
    assert card["pretrained_cfg"]["label_names"] == list(CLASSES)
    assert card["data"]["seeds"] == scenes.SPLIT_SEEDS
    assert card["training"]["command"] == "python -m moee_analysis.scenes_training"
    assert set(card["accuracy"]["per_class"]) == set(CLASSES)
    assert set(card["versions"]) == {"python", "torch", "timm", "numpy", "pillow"}


def test_the_defaults_are_what_made_the_stored_model(card):
    recipe = asdict(scenes_training.Recipe())
    assert {key: card["training"][key] for key in recipe} == recipe


def test_the_card_promises_a_model_that_discriminates(card):
    told = card["accuracy"]
    assert 0.88 <= told["top1_evaluation"] <= 0.97
    assert told["top1_evaluation"] - told["top1_half_pruned"] >= 0.15


def test_the_stored_model_keeps_its_promise(card, model):
    # All of the card's scenes; another version of Pillow may draw a few pixels differently.
    pictures = scenes_evaluation.rendered("evaluation", card["data"]["evaluation_images"])
    top1 = scenes_evaluation.top1(model, pictures)
    assert top1 == pytest.approx(card["accuracy"]["top1_evaluation"], abs=0.01)
    assert 0.88 <= top1 <= 0.97


def test_half_the_neurons_cannot_go_unnoticed(model, evaluation):
    # The card's 15 points less what 400 scenes and a smaller calibration set may differ by.
    before = scenes_evaluation.top1(model, evaluation)
    with scenes_evaluation.half_pruned(model, scenes_evaluation.rendered("calibration", 200)):
        pruned = scenes_evaluation.top1(model, evaluation)
    assert before - pruned >= 0.12
    assert scenes_evaluation.top1(model, evaluation) == before


def test_hidden_variances_match_a_plain_computation(model):
    pictures = scenes_evaluation.rendered("calibration", 8)
    kept = []
    handle = model.blocks[3].mlp.act.register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.inference_mode():
        model(scenes_evaluation.normalised(pictures.images))
    handle.remove()
    wanted = kept[0].flatten(0, 1).double().var(0, correction=0)
    found = scenes_evaluation.hidden_variances(model, pictures)[3]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_part_counts_match_a_plain_count():
    mask = scenes.render(6, 3).parts
    counts = scenes_evaluation.part_counts(mask)
    row, column = 5, 2
    patch = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert counts[8 * row + column].tolist() == [
        (patch == value).sum() for value in range(len(PARTS))
    ]


def test_mirroring_keeps_pictures_and_parts_together():
    torch.manual_seed(0)
    pictures = scenes_evaluation.rendered("calibration", 16)
    x = scenes_evaluation.normalised(pictures.images)
    mirrored, parts = scenes_training.mirrored(x, pictures.parts)
    turned = [(one != other).any().item() for one, other in zip(x, mirrored, strict=True)]
    assert 0 < sum(turned) < 16
    for index, turn in enumerate(turned):
        grid = pictures.parts[index].unflatten(0, (8, 8))
        wanted = grid.flip(1) if turn else grid
        assert (parts[index] == wanted.flatten(0, 1)).all()
        assert (mirrored[index] == (x[index].flip(2) if turn else x[index])).all()


def test_training_sees_what_the_model_sees():
    torch.manual_seed(0)
    model = scenes_training.build().eval()
    x = torch.randn(2, 3, 64, 64)
    every = torch.rand(2, 64).argsort(1)
    with torch.inference_mode():
        classes, tokens = scenes_training.logits(model, x, every)
        torch.testing.assert_close(classes, model(x), rtol=1e-4, atol=1e-5)
    assert tokens.shape == (2, 64, model.embed_dim)


def test_learning_rate_rises_stays_and_falls_to_zero():
    recipe = scenes_training.Recipe(epochs=10, cooldown_epochs=4)
    rates = [scenes_training.rate(epoch, recipe) for epoch in np.linspace(0, 10, 101)]
    assert rates[0] < 0.05
    assert rates[2:60] == [1.0] * 58
    assert rates[-1] == 0
    assert rates[60:] == sorted(rates[60:], reverse=True)


def test_evening_out_leaves_directions_and_equal_lengths():
    model = scenes_training.build()
    before = model.blocks[2].mlp.fc1.weight.detach().clone()
    scenes_training.even_out(model, pull=1.0)
    after = model.blocks[2].mlp.fc1.weight.detach()
    lengths = after.norm(dim=1)
    torch.testing.assert_close(lengths, before.norm(dim=1).mean().expand_as(lengths))
    torch.testing.assert_close(torch.cosine_similarity(before, after), torch.ones(len(before)))


def test_training_writes_both_files(tmp_path):
    recipe = scenes_training.Recipe(
        epochs=2, whole_epochs=1, train_images=20, batch_size=20,
        evaluation_images=20, calibration_images=20,
    )  # fmt: skip
    written = scenes_training.make(recipe, tmp_path, command="a test")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundled.json",
        "bundled.safetensors",
    ]
    assert json.loads((tmp_path / "bundled.json").read_text()) == written
    model = VisionTransformer(**written["kwargs"])
    model.load_state_dict(load_file(tmp_path / "bundled.safetensors"))


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        scenes_training.write(tmp_path, torch.nn.Linear(2, 2), {"not JSON": object()})
    assert not list(tmp_path.iterdir())
