from __future__ import annotations

import copy

import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.sparse_upcycling import SparseUpcyclingConfig, convert
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count
from moee_analysis.moe.expert_layer import expert_layers
from tests.helpers.images import toy_images
from tests.helpers.models import lively, pixels_of, same_models, toy_swin, toy_vit

MODELS = {"vit": toy_vit, "swin": toy_swin, "convnext": lambda: lively("test_convnext")}
IMAGES = toy_images(6)


def upcycled(dense, **settings):
    return convert(dense, IMAGES, SparseUpcyclingConfig(**{"experts": 4, **settings}))


def all_layers(dense):
    return tuple(site.index for site in find_mlps(dense))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [
    {"router": "top_k", "k": 1}, {"router": "top_k", "k": 2}, {"router": "top_k", "k": 4},
    {"router": "expert_choice", "capacity": 4.0}, {"router": "expert_choice", "capacity": 9.0},
])  # fmt: skip
def test_the_start_is_the_dense_model_where_every_token_has_an_expert(name, settings):
    dense = MODELS[name]()
    x = pixels_of(dense)
    model = upcycled(dense, layers=all_layers(dense), **settings)
    torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)


def test_gates_that_are_not_renormalised_scale_the_output():
    dense = toy_vit(depth=1)
    layer = upcycled(dense, layers=(0,), router="top_k", k=2, renormalise=False).blocks[0].mlp
    x = torch.randn(3, 17, 32)
    gates = torch.softmax(x @ layer.router.gate.weight.T, dim=-1).topk(2).values
    expected = gates.sum(dim=-1, keepdim=True) * dense.blocks[0].mlp(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("settings", "times"), [
    ({"router": "top_k", "k": 1}, 1), ({"router": "top_k", "k": 3}, 3),
    ({"router": "expert_choice", "capacity": 1.0}, 1),
    ({"router": "expert_choice", "capacity": 2.0}, 2),
    ({"router": "expert_choice", "capacity": 0.25}, 0.25),
])  # fmt: skip
def test_macs_are_those_of_so_many_mlps_and_the_router(name, settings, times):
    dense = MODELS[name]()
    counted = count(dense)
    model = upcycled(dense, layers=all_layers(dense), **settings)
    now, expected = count(model, sites=[]), 0
    for site in find_mlps(dense):
        tokens, each = counted.tokens[site.name], 2 * site.dim * site.hidden
        pairs = round(times * tokens / 4) * 4 if "capacity" in settings else times * tokens
        expected += pairs * each - tokens * each + tokens * 4 * site.dim
        assert now.by_module[site.name] == pairs * each + tokens * 4 * site.dim
    assert now.total == counted.total + expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", [0.03, 0.08])
def test_expert_choice_meets_a_budget_of_macs(name, reduction):
    dense = MODELS[name]()
    model = upcycled(dense, layers=all_layers(dense), macs_reduction=reduction)
    counted = count(dense)
    step = max(4 * counted.by_module[s.name] / counted.tokens[s.name] for s in find_mlps(dense))
    budget = (1 - reduction) * counted.total
    assert budget - step < count(model, sites=[]).total <= budget
    assert measure.macs(model)["macs"].iloc[-1] == count(model, sites=[]).total


def test_the_largest_saving_is_said_and_can_be_had():
    dense = toy_vit()
    with pytest.raises(MoeeError, match=r"at most 8\.9%; found 50\.0%"):
        upcycled(dense, macs_reduction=0.5)
    saved = 1 - count(upcycled(dense, macs_reduction=0.089), sites=[]).total / count(dense).total
    assert 0.089 <= saved < 0.09


def test_every_second_mlp_is_upcycled():
    model = upcycled(lively())
    assert list(expert_layers(model)) == ["blocks.1.mlp", "blocks.3.mlp", "blocks.5.mlp"]


def test_the_dense_model_is_not_touched():
    dense = toy_vit()
    before = copy.deepcopy(dense)
    model = upcycled(dense).requires_grad_().train()
    model(pixels_of(dense)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert same_models(dense, before)
    assert not dense.blocks[1].mlp.fc1.weight.requires_grad


def test_seeds_decide_the_routers_and_nothing_else():
    dense = toy_vit()
    first, same, other = (upcycled(dense, seed=seed) for seed in (0, 0, 1))
    assert same_models(first, same)
    unlike = {n for n, t in first.state_dict().items() if not torch.equal(t, other.state_dict()[n])}
    assert unlike == {"blocks.1.mlp.router.gate.weight"}
    std = upcycled(dense, experts=64).blocks[1].mlp.router.gate.weight.std().item()
    assert std == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_a_model_trains_and_stays_deterministic_in_evaluation(router):
    dense = toy_vit()
    model = upcycled(dense, router=router, noise=1.0)
    x = pixels_of(dense)
    assert not model.training
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.requires_grad_().train()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert model.blocks[1].mlp.router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_measures_and_controls_take_the_model(router):
    dense = toy_vit()
    model = upcycled(dense, router=router)
    systems = {
        "upcycled": model, "random": randomly_routed(model), "constant": constantly_routed(model),
    }  # fmt: skip
    table = measure.accuracy(systems | {"dense": dense}, IMAGES, reference="dense")
    assert table["top1"].between(0, 1).all()
    totals = {count(each, sites=[]).total for each in systems.values()}
    assert totals == {measure.macs(model)["macs"].iloc[-1]}
    assert same_models(copy.deepcopy(model), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pixels_of(dense)).isfinite().all()


@pytest.mark.parametrize(("settings", "message"), [
    ({"router": "top_k", "macs_reduction": 0.2}, "plain upcycling never reduces MACs"),
    ({"capacity": 1.0, "macs_reduction": 0.2}, "capacity or a MACs reduction"),
    ({"macs_reduction": 28}, "0.28 means 28 %"),
    ({"router": "hash"}, "expert_choice, top_k"),
    ({"router": "top_k", "k": 5}, "at most 4 experts"),
    ({"router": "top_k", "k": 0}, "k as a whole number"),
    ({"experts": 0}, "experts as a whole number"),
    ({"capacity": 0.0}, "capacity as a number above 0"),
    ({"noise": -1.0}, "noise as a number at least 0"),
    ({"layers": (3,)}, "layers between 0 and 2"),
    ({"layers": ()}, "layers between 0 and 2"),
])  # fmt: skip
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(MoeeError, match=message):
        upcycled(toy_vit(), **settings)
