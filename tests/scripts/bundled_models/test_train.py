"""How the bundled models are trained, from a step to the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moee_analysis.models.loading import BUNDLED_MODELS, find_mlps
from scripts.bundled_models import evaluation as scenes_evaluation
from scripts.bundled_models import model_card as scenes_card
from scripts.bundled_models import train as scenes_training
from scripts.bundled_models.architectures import RECIPES, Recipe, build, logits, patch_width

NAMES = list(BUNDLED_MODELS)
TINY = [
    "--epochs", "1", "--train-images", "20", "--evaluation-images", "20",
    "--calibration-images", "20", "--seed", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    return scenes_evaluation.rendered("calibration", 16)


# A step


def test_mirroring_keeps_pictures_and_parts_together(pictures):
    torch.manual_seed(0)
    x = scenes_evaluation.normalised(pictures.images)
    mirrored, parts = scenes_training.mirrored(x, pictures.parts)
    turned = [(one != other).any().item() for one, other in zip(x, mirrored, strict=True)]
    assert 0 < sum(turned) < 16
    for index, turn in enumerate(turned):
        grid = pictures.parts[index].unflatten(0, (8, 8))
        wanted = grid.flip(1) if turn else grid
        assert (parts[index] == wanted.flatten(0, 1)).all()
        assert (mirrored[index] == (x[index].flip(2) if turn else x[index])).all()


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_what_the_model_sees(name):
    torch.manual_seed(0)
    model = build(name).eval()
    x = torch.randn(2, 3, 64, 64)
    every = torch.rand(2, 64).argsort(1)
    with torch.inference_mode():
        classes, tokens = logits(model, x, every)
        torch.testing.assert_close(classes, model(x), rtol=1e-4, atol=1e-5)
    assert tokens.shape == (2, 64, patch_width(model))


@pytest.mark.parametrize("name", ["bundled_swin", "bundled_convnext"])
def test_the_tokens_of_the_patches_in_sight_are_those_of_their_places(name):
    torch.manual_seed(0)
    model = build(name).eval()
    x = torch.randn(2, 3, 64, 64)
    seen = torch.tensor([[63, 9], [0, 20]])
    with torch.inference_mode():
        _, tokens = logits(model, x, seen)
        (grid,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    for picture in range(2):
        for place, patch in enumerate(seen[picture].tolist()):
            cell = grid[picture, :, patch // 8, patch % 8]
            wanted = (cell - cell.mean()) / cell.std(correction=0)
            torch.testing.assert_close(tokens[picture, place], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(name):
    model, part_head = build(name), nn.Linear(2, 2)
    muon, adamw = scenes_training.optimisers(model, part_head, RECIPES[name])
    fast = {id(w) for w in muon.param_groups[0]["params"]}
    slow = {id(w) for w in adamw.param_groups[0]["params"]}
    assert not fast & slow
    assert fast | slow == {id(w) for w in (*model.parameters(), *part_head.parameters())}
    for site in find_mlps(model):
        assert {id(site.module(model).fc1.weight), id(site.module(model).fc2.weight)} <= fast
    assert id(model.get_classifier().weight) in slow
    assert all(id(w) in slow for w in model.parameters() if w.ndim != 2)


@pytest.mark.parametrize("name", NAMES)
def test_steps_lower_the_loss_of_their_pictures(name, pictures):
    torch.manual_seed(0)
    recipe = Recipe(epochs=6, warmup_epochs=1e-3, cooldown_epochs=1, whole_epochs=6)
    training = scenes_training.Training(recipe, build(name))
    losses = [training.epoch(epoch, pictures) for epoch in range(6)]
    assert losses[-1] < losses[0] - 0.3


def test_learning_rate_rises_stays_and_falls_to_zero():
    recipe = Recipe(epochs=10, cooldown_epochs=4)
    rates = [scenes_training.rate(epoch, recipe) for epoch in np.linspace(0, 10, 101)]
    assert rates[0] < 0.05
    assert rates[2:60] == [1.0] * 58
    assert rates[-1] == 0
    assert rates[60:] == sorted(rates[60:], reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_evening_out_leaves_directions_and_equal_lengths(name):
    model = build(name)
    fc1 = [site.module(model).fc1 for site in find_mlps(model)]
    before = [layer.weight.detach().clone() for layer in fc1]
    scenes_training.even_out(model, pull=1.0)
    for rows, layer in zip(before, fc1, strict=True):
        after = layer.weight.detach()
        lengths = after.norm(dim=1)
        torch.testing.assert_close(lengths, rows.norm(dim=1).mean().expand_as(lengths))
        torch.testing.assert_close(torch.cosine_similarity(rows, after), torch.ones(len(rows)))


# The command


@pytest.mark.parametrize("name", NAMES)
def test_the_command_trains_and_writes_both_files(name, tmp_path, capsys):
    scenes_training.main(["--model", name, *TINY, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.json",
        f"{name}.safetensors",
    ]
    card = json.loads((tmp_path / f"{name}.json").read_text())
    assert card["accuracy"] == json.loads(capsys.readouterr().out)
    assert (card["name"], card["training"]["epochs"], card["training"]["seed"]) == (name, 1, 3)
    model = BUNDLED_MODELS[name](**card["kwargs"])
    model.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))


def test_the_same_command_makes_the_same_model(tmp_path):
    for place in ("a", "b"):
        scenes_training.main(["--model", "bundled_swin", *TINY, "--out", str(tmp_path / place)])
    one, other = (load_file(tmp_path / place / "bundled_swin.safetensors") for place in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_a_model_the_command_trains_the_vit(tmp_path):
    scenes_training.main([*TINY, "--out", str(tmp_path)])
    assert (tmp_path / "bundled.safetensors").is_file()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        scenes_card.write(tmp_path, nn.Linear(2, 2), {"name": "x", "not JSON": object()})
    assert not list(tmp_path.iterdir())
