from __future__ import annotations

import copy

import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.soft_moe import SoftMoeConfig, convert
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count
from moee_analysis.moe.expert_layer import expert_layers
from tests.helpers.images import toy_images
from tests.helpers.models import lively, pixels_of, same_models, toy_swin, toy_vit

MODELS = {"vit": toy_vit, "swin": toy_swin, "convnext": lambda: lively("test_convnext")}
IMAGES = toy_images(6)


def soft(dense, **settings):
    return convert(dense, IMAGES, SoftMoeConfig(**{"experts": 4, **settings}))


def all_layers(dense):
    return tuple(site.index for site in find_mlps(dense))


def macs_of(site, tokens, slots):
    """MACs of a layer with so many slots: their MLPs; logits, dispatch and combination."""
    return 2 * slots * site.dim * site.hidden + 3 * tokens * slots * site.dim


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{"slots": 1}, {"slots": 3}, {"capacity_factor": 0.5}, {}])
def test_macs_of_logits_dispatch_and_combination_count(name, settings):
    dense = MODELS[name]()
    model, counted = soft(dense, layers=all_layers(dense), **settings), count(dense)
    now, expected = count(model, sites=[]), counted.total
    for site in find_mlps(dense):
        tokens = counted.tokens[site.name]
        share = round(settings.get("capacity_factor", 1) * tokens / 4)
        macs = macs_of(site, tokens, 4 * settings.get("slots", share))
        assert now.by_module[site.name] == macs
        expected += macs - counted.by_module[site.name]
    assert now.total == expected
    assert model(pixels_of(dense)).shape == (4, dense.num_classes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", [0.03, 0.07])
def test_slots_meet_a_budget_of_macs(name, reduction):
    dense = MODELS[name]()
    model = soft(dense, experts=2, layers=all_layers(dense), macs_reduction=reduction)
    counted = count(dense)
    step = max(macs_of(site, counted.tokens[site.name], 2) for site in find_mlps(dense))
    budget = (1 - reduction) * counted.total
    assert budget - step < count(model, sites=[]).total <= budget
    assert measure.macs(model)["macs"].iloc[-1] == count(model, sites=[]).total


def test_the_largest_saving_is_said():
    with pytest.raises(MoeeError, match=r"at most \d+\.\d%; found 50.0%"):
        soft(toy_vit(), macs_reduction=0.5)


def test_the_second_half_is_exchanged():
    assert list(expert_layers(soft(lively()))) == ["blocks.3.mlp", "blocks.4.mlp", "blocks.5.mlp"]


@pytest.mark.parametrize("name", MODELS)
def test_an_upcycled_expert_is_the_dense_mlp(name):
    """One expert with one slot: all tokens get its MLP of what dispatch mixes."""
    dense = MODELS[name]()
    site = find_mlps(dense)[0]
    layer = site.module(soft(dense, experts=1, slots=1, layers=(0,)))
    x = torch.randn(2, 3, 4, site.dim)
    dispatch = layer.router(x.flatten(1, 2)).dispatch
    slot = (dispatch * x.flatten(1, 2)).sum(1)
    expected = site.module(dense)(slot)[:, None, None].expand_as(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_upcycled_experts_are_alike_and_fresh_ones_differ():
    dense = toy_vit()
    (alike,) = soft(dense, layers=(2,)).blocks[2].mlp.groups
    assert (alike.fc1_weight == dense.blocks[2].mlp.fc1.weight).all()
    assert (alike.fc2_bias == dense.blocks[2].mlp.fc2.bias).all()
    (fresh,) = soft(dense, layers=(2,), initialisation="fresh").blocks[2].mlp.groups
    for weight in (fresh.fc1_weight, fresh.fc2_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not torch.equal(weight[0], weight[1])
    assert not fresh.fc1_bias.any()
    assert not fresh.fc2_bias.any()


@pytest.mark.parametrize("initialisation", ["upcycled", "fresh"])
def test_seeds_decide(initialisation):
    dense = toy_vit()
    settings = {"initialisation": initialisation}
    first, same, other = (soft(dense, seed=seed, **settings) for seed in (0, 0, 1))
    assert same_models(first, same)
    assert not same_models(first, other)


def test_the_dense_model_is_not_touched():
    dense = toy_vit()
    before = copy.deepcopy(dense)
    model = soft(dense).requires_grad_().train()
    model(pixels_of(dense)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert same_models(dense, before)
    assert not dense.blocks[1].mlp.fc1.weight.requires_grad


def test_noise_and_dropout_are_for_training_only():
    dense = toy_vit()
    x = pixels_of(dense)
    for settings in ({"noise": 1.0}, {"drop": 0.5}):
        model = soft(dense, **settings)
        assert not model.training
        torch.testing.assert_close(model(x), soft(dense)(x), rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_gradients_reach_every_parameter():
    dense = toy_vit()
    model = soft(dense).requires_grad_().train()
    model(pixels_of(dense)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    router = model.blocks[2].mlp.router
    assert router.scale.grad.abs() > 0
    assert router.embeddings.grad.abs().sum() > 0


def test_measures_and_controls_take_the_model():
    dense = toy_vit()
    model = soft(dense, layers=all_layers(dense))
    systems = {
        "soft": model, "random": randomly_routed(model), "constant": constantly_routed(model),
    }  # fmt: skip
    table = measure.accuracy(systems | {"dense": dense}, IMAGES, reference="dense")
    assert table["top1"].between(0, 1).all()
    assert count(systems["random"], sites=[]).total == measure.macs(model)["macs"].iloc[-1]
    assert same_models(copy.deepcopy(model), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pixels_of(dense)).isfinite().all()


@pytest.mark.parametrize(("settings", "message"), [
    ({"experts": 0}, "experts as a whole number"),
    ({"slots": 0}, "slots as a whole number"),
    ({"slots": 1, "macs_reduction": 0.1}, "slots or a MACs reduction"),
    ({"macs_reduction": 28}, "0.28 means 28 %"),
    ({"capacity_factor": 0.0}, "capacity_factor as a number above 0"),
    ({"initialisation": "copied"}, "upcycled, fresh"),
    ({"drop": 1.0}, "drop as a number at least 0 and below 1"),
    ({"noise": -0.1}, "noise as a number at least 0"),
    ({"layers": (9,)}, "layers between 0 and 2"),
])  # fmt: skip
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(MoeeError, match=message):
        soft(toy_vit(), **settings)
