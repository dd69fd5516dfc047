from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.counting import count, count_parameters
from moee_analysis.errors import MoeeError
from moee_analysis.layers import moe_layers
from moee_analysis.models import find_mlps
from moee_analysis.rivals.moefication import deal_neurons, matching_active, moefy
from tests.toys import toy_images, toy_swin, toy_vit

ROUTERS = ("centre", "oracle", "random")


@pytest.fixture(scope="module")
def x():
    return next(toy_images(6).batches(toy_vit()))


def tokens(count=200):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [toy_vit, toy_swin])
@pytest.mark.parametrize("router", ROUTERS)
def test_all_experts_together_are_the_dense_model(make, router, x):
    dense = make()
    same = moefy(dense, active=1.0, n_experts=8, router=router)
    torch.testing.assert_close(same(x), dense(x), atol=1e-5, rtol=1e-5)


def test_the_dense_model_is_not_touched(x):
    dense = toy_vit()
    before = dense(x)
    moefy(dense, active=0.25, n_experts=8)
    assert not moe_layers(dense)
    torch.testing.assert_close(dense(x), before, atol=0, rtol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_computes_its_chosen_neurons_only(router):
    dense = toy_vit().blocks[0].mlp
    layer = moe_layers(moefy(toy_vit(), active=0.25, n_experts=8, router=router))[0]
    inputs = tokens(20)
    chosen = layer.router(inputs)
    hidden = dense.act(dense.fc1(inputs))
    used = torch.zeros_like(hidden)
    for token, expert in ((t, e) for t in range(20) for e in chosen[t]):
        used[token, layer.kept[layer.expert_neurons(int(expert))]] = 1
    assert (used.sum(1) == 16).all()
    torch.testing.assert_close(layer(inputs), dense.fc2(used * hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_of_a_token_differ_and_a_pass_can_be_repeated(router):
    layer = moe_layers(moefy(toy_vit(), active=0.5, n_experts=8, router=router))[0]
    chosen = layer.router(tokens())
    assert chosen.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    torch.testing.assert_close(layer.router(tokens()), chosen)


def test_the_centre_router_ranks_by_distance():
    model = toy_vit()
    layer = moe_layers(moefy(model, active=0.25, n_experts=8))[0]
    expert_of, centres = deal_neurons(model.blocks[0].mlp.fc1.weight, 8)
    inputs = tokens()
    distances = torch.cdist(torch.nn.functional.normalize(inputs, dim=1), centres)
    expected = distances.topk(2, largest=False).indices
    torch.testing.assert_close(layer.router(inputs), expected)
    rows = torch.nn.functional.normalize(model.blocks[0].mlp.fc1.weight, dim=1)
    torch.testing.assert_close(centres[3], rows[expert_of == 3].mean(0))


def test_the_oracle_captures_more_than_any_router():
    layers = {r: moe_layers(moefy(toy_vit(), active=0.25, n_experts=8, router=r)) for r in ROUTERS}
    oracle, inputs = layers["oracle"][1].router, tokens()
    scores = oracle.scores(inputs)
    captured = {r: scores.gather(1, layers[r][1].router(inputs)).sum(1) for r in ROUTERS}
    assert (captured["oracle"] >= captured["centre"] - 1e-5).all()
    assert (captured["oracle"] >= captured["random"] - 1e-5).all()
    assert captured["oracle"].mean() > captured["random"].mean()


def test_the_random_router_is_even():
    layer = moe_layers(moefy(toy_vit(), active=0.25, n_experts=8, router="random"))[0]
    shares = np.bincount(layer.router(tokens(4000)).flatten(), minlength=8) / 4000
    assert shares == pytest.approx(np.full(8, 0.25), abs=0.03)


@pytest.mark.parametrize(("options", "sizes"), [
    ({"n_experts": 8}, [8] * 8),
    ({"expert_size": 16}, [16] * 4),
    ({"n_experts": 6}, [11, 11, 11, 11, 10, 10]),
    ({}, [8] * 8),
])  # fmt: skip
def test_expert_sizes(options, sizes):
    layer = moe_layers(moefy(toy_vit(depth=1), active=0.5, **options))[0]
    assert sorted(layer.expert_sizes, reverse=True) == sizes


@pytest.mark.parametrize("reduction", [0.1, 0.2, 0.25])
def test_matched_macs_are_met_to_within_one_expert(reduction):
    dense = toy_vit()
    active = matching_active(dense, reduction, n_experts=16)
    table = measure.macs(moefy(dense, active=active, n_experts=16))
    one_expert = table["macs_dense"].iloc[0] / 16
    goal = (1 - reduction) * count(dense).total
    assert table["macs"].iloc[-1] == pytest.approx(goal, abs=one_expert)


def test_matched_macs_of_unequal_layers():
    dense = toy_swin()
    active = matching_active(dense, 0.2, n_experts=16)
    table = measure.macs(moefy(dense, active=active, n_experts=16))
    one_expert_each = table["macs_dense"].iloc[:-2].sum() / 16
    assert table["macs"].iloc[-1] == pytest.approx(0.8 * count(dense).total, abs=one_expert_each)


def test_no_parameters_are_saved_and_the_oracle_stores_none():
    dense = toy_vit()
    stored = {r: count_parameters(moefy(dense, active=0.5, n_experts=8, router=r)) for r in ROUTERS}
    own = count_parameters(dense)
    assert stored == {"centre": own + 3 * 8 * 32, "oracle": own, "random": own}


def test_only_the_named_sites_are_converted():
    dense = toy_vit()
    model = moefy(dense, active=0.5, sites=find_mlps(dense)[1:])
    assert list(moe_layers(model)) == [1, 2]


@pytest.mark.parametrize(("options", "message"), [
    ({"active": 0.0}, "share"),
    ({"active": 1.5}, "share"),
    ({"active": 0.5, "n_experts": 65}, "1 to 64 experts"),
    ({"active": 0.5, "n_experts": 4, "expert_size": 4}, "one of them"),
    ({"active": 0.5, "router": "best"}, "centre, oracle, random"),
])  # fmt: skip
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(MoeeError, match=message):
        moefy(toy_vit(depth=1), **options)


def test_an_impossible_budget_is_refused():
    with pytest.raises(MoeeError, match="MACs reduction between"):
        matching_active(toy_vit(), 0.9)
