from __future__ import annotations

import pytest
import torch

from moee_analysis.baselines.common.soft_moe_layer import SlotMlp
from moee_analysis.baselines.jetpack_study import JETPACK, PRETRAINED, SCRATCH, JetpackStudy
from moee_analysis.data.images import load_images
from moee_analysis.models.loading import find_mlps, load_model
from moee_analysis.models.macs import count
from tests.helpers.models import same_models

IMAGES = load_images("bundled", split="calibration", limit=20)


@pytest.fixture(scope="module", params=["bundled", "bundled_convnext"])
def study(request, tmp_path_factory):
    return JetpackStudy(load_model(request.param), IMAGES, store=tmp_path_factory.mktemp("store"))


def slot_layers(model):
    return [m for m in model.modules() if isinstance(m, SlotMlp)]


def test_all_but_those_that_vary_their_number_cost_the_macs_of_the_dense_successor(study):
    wanted = count(study.scratch(0), sites=[]).total
    assert wanted < count(study.dense).total / 3
    for starts in (study.components(), study.methods(), study.core_shares()):
        for name, start in starts.items():
            assert count(start(0), sites=[]).total == pytest.approx(wanted, rel=0.01), name


def test_all_see_the_same_images_and_know_the_same_classes(study):
    x = torch.zeros(2, 3, 64, 64)
    for starts in (study.components(), study.methods(), study.core_shares(), study.sizes()):
        for start in starts.values():
            model = start(1)
            assert model(x).shape == (2, 20)
            assert model.pretrained_cfg["label_names"] == study.dense.pretrained_cfg["label_names"]


def test_starts_have_what_their_names_say(study):
    starts = study.components()
    assert len(find_mlps(starts[SCRATCH](0))) == len(find_mlps(study.dense))
    assert not slot_layers(starts[PRETRAINED](0))
    (layer, *_) = slot_layers(starts[JETPACK](0))
    core, universal = layer.groups
    assert core.hidden == 4 * universal.hidden
    assert core.n_experts / layer.n_experts == pytest.approx(1 / 3, abs=0.02)
    shares = [
        sum(g.n_experts for g in slot_layers(s(0))[0].groups if g.hidden == core.hidden)
        / slot_layers(s(0))[0].n_experts
        for s in study.core_shares().values()
    ]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.02)
    copies = slot_layers(study.methods()["copies of one MLP"](0))[0].groups[0].fc1_weight
    assert torch.equal(copies[0], copies[-1])


def test_layers_and_numbers_of_experts_vary(study):
    usual = slot_layers(study.jetpack()(0))
    fewer, more, half, twice = (slot_layers(start(0)) for start in study.sizes().values())
    assert len(fewer) < len(usual) < len(more)
    assert half[0].n_experts < usual[0].n_experts < twice[0].n_experts
    assert len(half) == len(usual) == len(twice)


def test_seeds_make_other_starts_and_the_same_one_the_same(study):
    for start in study.components().values():
        assert same_models(start(3), start(3))
        assert not same_models(start(3), start(4))
