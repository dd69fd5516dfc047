"""The bundled models as they are stored: what a user may rely on."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.data.images import load_images
from moee_analysis.data.scenes.scene import CLASSES, PARTS, SPLIT_SEEDS, render
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.models.loading import (
    BUNDLED_MODELS,
    architecture,
    build_model,
    class_names,
    find_mlps,
    fingerprint,
    load_model,
)
from moee_analysis.models.macs import count
from moee_analysis.utils.paths import data_folder
from scripts.bundled_models import evaluation as scenes_evaluation
from scripts.bundled_models.architectures import ARCHITECTURES, RECIPES
from tests.helpers.models import pixels_of, same_models
from tests.helpers.runs import best

NAMES = list(BUNDLED_MODELS)
COMMANDS = {
    "bundled": "python -m scripts.bundled_models.train",
    "bundled_swin": "python -m scripts.bundled_models.train --model bundled_swin",
    "bundled_convnext": "python -m scripts.bundled_models.train --model bundled_convnext",
}


def card_of(name: str) -> dict:
    return json.loads((data_folder() / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluation():
    """All scenes that the cards speak of."""
    return scenes_evaluation.rendered("evaluation", 2000)


# The files


def test_there_are_a_vit_a_swin_and_a_convnext_of_timm_s():
    assert list(BUNDLED_MODELS.values()) == [VisionTransformer, SwinTransformer, ConvNeXt]
    assert set(ARCHITECTURES) == set(RECIPES) == set(BUNDLED_MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_model_is_small(name):
    assert (data_folder() / f"{name}.safetensors").stat().st_size <= 8e6


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_how_the_model_came_about(name):
    card = card_of(name)
    assert (card["format"], card["name"]) == (1, name)
    assert card["architecture"] == BUNDLED_MODELS[name].__module__.rpartition(".")[2]
    assert card["kwargs"] == json.loads(json.dumps(ARCHITECTURES[name].kwargs))
    assert card["pretrained_cfg"]["label_names"] == list(CLASSES)
    assert card["data"]["seeds"] == SPLIT_SEEDS
    assert card["training"]["command"] == COMMANDS[name]
    assert {key: card["training"][key] for key in asdict(RECIPES[name])} == asdict(RECIPES[name])
    assert set(card["accuracy"]["per_class"]) == set(CLASSES)
    assert set(card["versions"]) == {"python", "torch", "timm", "numpy", "pillow"}


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_layers_of_the_model(name):
    model = load_model(name)
    stem = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert isinstance(stem, torch.nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == len(CLASSES)


# The models


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_loaded_by_name_with_the_stored_weights(name):
    model = load_model(name)
    assert type(model) is BUNDLED_MODELS[name]
    assert not model.training
    assert architecture(model) == name
    assert class_names(model) == CLASSES
    assert "file" not in model.pretrained_cfg
    stored = load_file(data_folder() / f"{name}.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert fingerprint(model) == fingerprint(load_model(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_an_mlp_that_can_be_taken_apart(name):
    model = build_model(name)
    depths = ARCHITECTURES[name].kwargs.get("depths", (12,))
    sites = find_mlps(model)
    assert [site.index for site in sites] == list(range(sum(depths)))
    assert all(type(site.module(model)) is Mlp for site in sites)
    assert all(site.hidden == 4 * site.dim for site in sites)
    assert set(count(model).tokens) == {site.name for site in sites}


def test_a_misspelt_bundled_model_is_corrected():
    with pytest.raises(MoeeError, match="did you mean bundled_swin") as caught:
        load_model("bundled_swim")
    assert "bundled, bundled_swin, bundled_convnext or the name of a timm" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_of_a_bundled_architecture_are_taken_and_remembered(name, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(build_model(name).state_dict(), path)
    assert load_model(name, weights=path).pretrained_cfg["file"] == str(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_bundled_model_is_saved_and_loaded(name, tmp_path):
    images = load_images("bundled", split="calibration", limit=40)
    run = extract(load_model(name), images, best(macs_reduction=0.1))
    run.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert any(layer.converted for layer in run.layers)
    assert same_models(loaded.model, run.model)
    x = pixels_of(run.model, count=3)
    torch.testing.assert_close(loaded.model(x), run.model(x))


# What they are worth


@pytest.mark.parametrize("name", NAMES)
def test_the_card_promises_a_model_that_discriminates(name):
    told = card_of(name)["accuracy"]
    assert 0.88 <= told["top1_evaluation"] <= 0.97
    assert told["top1_evaluation"] - told["top1_half_pruned"] >= 0.15


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_model_keeps_its_promise(name, evaluation):
    # All of the card's scenes; another version of Pillow may draw a few pixels differently.
    top1 = scenes_evaluation.top1(load_model(name), evaluation)
    assert top1 == pytest.approx(card_of(name)["accuracy"]["top1_evaluation"], abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_half_the_neurons_cannot_go_unnoticed(name, evaluation):
    # The card's 15 points less what 400 scenes and a smaller calibration set may differ by.
    model, pictures = load_model(name), evaluation.first(400)
    before = scenes_evaluation.top1(model, pictures)
    with scenes_evaluation.half_pruned(model, scenes_evaluation.rendered("calibration", 200)):
        pruned = scenes_evaluation.top1(model, pictures)
    assert before - pruned >= 0.12
    assert scenes_evaluation.top1(model, pictures) == before


@pytest.mark.parametrize("name", NAMES)
def test_hidden_variances_match_a_plain_computation(name):
    model = load_model(name)
    pictures = scenes_evaluation.rendered("calibration", 8)
    kept = []
    site = find_mlps(model)[3]
    act = site.module(model).act
    handle = act.register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.inference_mode():
        model(scenes_evaluation.normalised(pictures.images))
    handle.remove()
    wanted = kept[0].flatten(0, -2).double().var(0, correction=0)
    found = scenes_evaluation.hidden_variances(model, pictures)[site.index]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_part_counts_match_a_plain_count():
    mask = render(6, 3).parts
    counts = scenes_evaluation.part_counts(mask)
    row, column = 5, 2
    patch = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert counts[8 * row + column].tolist() == [
        (patch == value).sum() for value in range(len(PARTS))
    ]
