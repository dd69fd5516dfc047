import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.baselines.common.soft_moe_layer import SlotMlp
from moee_analysis.baselines.jetpack_study import COPIES, JETPACK, PRETRAINED, SCRATCH, JetpackStudy
from moee_analysis.data.images import load_images
from moee_analysis.models.loading import find_mlps, load_model
from moee_analysis.models.macs import count
from tests.helpers.models import same_models

IMAGES = load_images("bundled", split="calibration", limit=4)


@pytest.fixture(scope="module", params=["bundled", "bundled_convnext"])
def study(request, tmp_path_factory):
    return JetpackStudy(load_model(request.param), IMAGES, store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(study):
    """Models of the seed 0, by the part of the study and the name of the start."""
    parts = ["components", "core_shares", "sizes"]
    parts += ["methods"] if isinstance(study.dense, VisionTransformer) else []
    return {part: {n: start(0) for n, start in getattr(study, part)().items()} for part in parts}


def slot_layers(model):
    return [m for m in model.modules() if isinstance(m, SlotMlp)]


def test_all_cost_the_macs_of_the_dense_successor_and_see_and_know_the_same(study, made):
    wanted, x = count(made["components"][SCRATCH], sites=[]).total, torch.zeros(2, 3, 64, 64)
    assert wanted < count(study.dense).total / 3
    for part, models in made.items():
        for name, model in models.items():
            assert model(x).shape == (2, 20)
            assert model.pretrained_cfg["label_names"] == study.dense.pretrained_cfg["label_names"]
            if part != "sizes":  # which vary the number of experts
                assert count(model, sites=[]).total == pytest.approx(wanted, rel=0.01), name


def test_starts_have_what_their_names_say(study, made):
    models = made["components"]
    assert len(find_mlps(models[SCRATCH])) == len(find_mlps(study.dense))
    assert not slot_layers(models[PRETRAINED])
    usual = slot_layers(models[JETPACK])
    core, universal = usual[0].groups
    assert core.hidden == 4 * universal.hidden
    assert core.n_experts / usual[0].n_experts == pytest.approx(1 / 3, abs=0.02)
    layers = [slot_layers(model)[0] for model in made["core_shares"].values()]
    cores = [sum(g.n_experts for g in e.groups if g.hidden == core.hidden) for e in layers]
    shares = [number / layer.n_experts for number, layer in zip(cores, layers, strict=True)]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.02)
    if "methods" in made:
        copies = slot_layers(made["methods"][COPIES])[0].groups[0].fc1_weight
        assert torch.equal(copies[0], copies[-1])
    fewer, more, half, twice = map(slot_layers, made["sizes"].values())
    assert len(fewer) < len(usual) < len(more)
    assert half[0].n_experts < usual[0].n_experts < twice[0].n_experts
    assert len(half) == len(usual) == len(twice)


@pytest.mark.parametrize("study", ["bundled"], indirect=True)
def test_seeds_make_other_starts_and_the_same_one_the_same(study, made):
    for name, start in study.components().items():
        assert same_models(start(0), made["components"][name])
        assert not same_models(start(4), made["components"][name])
