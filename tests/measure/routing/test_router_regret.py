from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.controls import with_one_expert
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.recorded_tokens import capture_mlps
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.oracle import OracleRouter
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter, RandomRouter
from tests.helpers.images import toy_images
from tests.helpers.models import same_models, toy_kinds, toy_moe, toy_vit
from tests.helpers.runs import best, quick

CALIBRATION, IMAGES = toy_images(24), toy_images(34).take(range(24, 34))
CONFIGS = {
    "paper": quick(macs_reduction=0.1, tokens_per_image=17),
    "best": best(macs_reduction=0.25),  # CLS has an expert of its own
}
NAMES = ["cosine", "nearest", "random", "constant", "oracle"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module", params=CONFIGS)
def run(request, store):
    return extract(toy_vit(), CALIBRATION, CONFIGS[request.param], store=store)


@pytest.fixture(scope="module")
def choices(run, store):
    return measure.router_choices(run, CALIBRATION, store=store, seed=5)


@pytest.fixture(scope="module")
def table(run, choices):
    return measure.router_regret(run, IMAGES, choices, batch_size=4)


def leading(run):
    """Leading tokens (and experts) that are not routed."""
    return int(run.config.tokens == "kinds")


def inner(router):
    return getattr(router, "inner", router)


def inputs_of(run, layer, images):
    """What the layer's MLP sees in the dense model, (images, tokens, dim)."""
    dense, site = run.original, find_mlps(run.original)[layer]
    with torch.no_grad(), capture_mlps(dense, [site]) as seen:
        dense(torch.cat(list(images.batches(dense))))
    return seen[site.name]["inputs"]


def errors_by_hand(run, index, images):
    """Dense outputs and squared errors of every routed token, expert by expert, float64."""
    layer, mlp, first = moe_layers(run.model)[index], run.original.blocks[index].mlp, leading(run)
    tokens = inputs_of(run, index, images)[:, first:].flatten(end_dim=1)
    errors = []
    with torch.no_grad():
        wanted = torch.stack([mlp(x) for x in tokens]).double()
        for expert in range(first, layer.n_experts):
            ids = layer.expert_neurons(expert)
            shift = 0 if layer.shift is None else layer.shift[expert]
            found = []
            for x in tokens:
                hidden = torch.nn.functional.gelu(layer.fc1.weight[ids] @ x + layer.fc1.bias[ids])
                found.append(layer.fc2.weight[:, ids] @ hidden + layer.fc2.bias + shift)
            errors.append((torch.stack(found).double() - wanted).square().sum(dim=1))
    return wanted.numpy(), torch.stack(errors, dim=1).numpy()


def test_the_oracle_takes_the_expert_with_the_least_error(run):
    for index, layer in moe_layers(run.model).items():
        oracle = OracleRouter(run.original.blocks[index].mlp, layer, leading=leading(run))
        x = inputs_of(run, index, IMAGES.take([0, 1]))[:, leading(run) :]
        _, errors = errors_by_hand(run, index, IMAGES.take([0, 1]))
        np.testing.assert_allclose(oracle.errors(x), errors, rtol=1e-3, atol=1e-5)
        chosen = oracle(x)
        assert (chosen.shape, chosen.dtype) == ((len(errors), 1), torch.int64)
        taken = np.take_along_axis(errors, chosen.numpy(), axis=1)[:, 0]
        np.testing.assert_allclose(taken, errors.min(axis=1), rtol=1e-3, atol=1e-5)


def test_the_oracle_is_no_part_of_a_model_and_pays_for_every_expert():
    model = toy_moe(toy_vit())
    layer, before = moe_layers(model)[0], dict(model.state_dict())
    layer.router = OracleRouter(toy_vit().blocks[0].mlp, layer)
    layer.router(torch.randn(2, 3, 32))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert before.keys() - after.keys() == {"blocks.0.mlp.router.centres"}
    layer = moe_layers(toy_kinds(toy_vit()))[1]
    oracle = OracleRouter(toy_vit().blocks[1].mlp, layer, leading=1)
    assert oracle.n_experts == 3
    assert oracle.macs == 2 * 32 * (64 + 9 + 14 + 0)


def test_there_are_five_routers_for_every_layer_with_a_choice(run, choices):
    assert sorted(choices) == sorted(NAMES)
    layers, first = moe_layers(run.model), leading(run)
    several = [index for index, layer in layers.items() if layer.n_experts - first > 1]
    assert several
    for routers in choices.values():
        assert list(routers) == several
        for index, router in routers.items():
            x = inputs_of(run, index, IMAGES)
            chosen = router(x).reshape(x.shape[:2])
            assert (chosen[:, :first] == 0).all()
            assert (chosen[:, first:] >= first).all()
            assert chosen.max() < layers[index].n_experts
    watched = measure.routes(run.dense(), IMAGES, routers=choices["oracle"])
    for index, oracle in choices["oracle"].items():  # asked while its dense MLP is watched
        x = inputs_of(run, index, IMAGES)
        np.testing.assert_array_equal(watched.experts[index], oracle(x).reshape(x.shape[:2]))


def test_one_of_the_routers_is_the_run_s_own(run, choices):
    for index, router in choices[run.config.router].items():
        assert same_models(router, moe_layers(run.model)[index].router)
    again = measure.rerouted(run, choices[run.config.router])
    assert same_models(again, run.model)


def test_the_other_one_has_the_means_of_the_tokens_that_the_run_routes(run, choices):
    other = {"cosine": "nearest", "nearest": "cosine"}[run.config.router]
    for index, router in choices[other].items():
        layer, first = moe_layers(run.model)[index], leading(run)
        x = inputs_of(run, index, CALIBRATION)
        chosen = layer.router(x).reshape(x.shape[:2])[:, first:].flatten() - first
        tokens = x[:, first:].flatten(end_dim=1)
        means = torch.stack([tokens[chosen == e].mean(dim=0) for e in chosen.unique()])
        assert len(means) == layer.n_experts - first
        if other == "cosine":
            assert isinstance(inner(router), CosineRouter)
            torch.testing.assert_close(inner(router).centres, means, rtol=2e-3, atol=2e-3)
        else:
            assert isinstance(inner(router), NearestRouter)
            scores = inner(router)(means)[:, 0]
            assert torch.equal(scores, torch.arange(len(means)))  # a mean is nearest to itself


def test_random_and_constant_follow_the_calibration(run, choices, store):
    for index, layer in moe_layers(run.model).items():
        if index in choices["random"]:
            random, constant = (inner(choices[name][index]) for name in ("random", "constant"))
            shares = layer.shares[leading(run) :]
            assert isinstance(random, RandomRouter)
            assert random.n_experts == len(shares)
            found = random(torch.randn(20_000, 32))[:, 0].bincount(minlength=len(shares))
            expected = shares / shares.sum()
            torch.testing.assert_close(found / 20_000, expected, atol=0.02, rtol=0)
            assert isinstance(constant, ConstantRouter)
            assert int(constant.expert) == int(shares.argmax())
    other = measure.router_choices(run, CALIBRATION, store=store, seed=6)
    index = min(choices["random"])
    one, two = (inner(c["random"][index]).directions for c in (choices, other))
    assert not torch.equal(one, two)


def test_rerouting_changes_the_routers_that_are_given_and_nothing_of_the_run(run, choices):
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    index = max(choices["constant"])
    model = measure.rerouted(run, {index: choices["constant"][index]})
    for place, layer in moe_layers(model).items():
        own = moe_layers(run.model)[place]
        assert layer.router is not own.router
        changed = place == index
        assert isinstance(inner(layer.router), ConstantRouter) >= changed
        assert torch.equal(layer.fc1.weight, own.fc1.weight)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_errors_and_regrets_are_those_of_one_token_after_the_other(run, choices, table):
    for index in choices["cosine"]:
        wanted, errors = errors_by_hand(run, index, IMAGES)
        scale = ((wanted - wanted.mean(axis=0)) ** 2).sum()
        x = inputs_of(run, index, IMAGES)
        for name, routers in choices.items():
            chosen = routers[index](x).reshape(x.shape[:2])[:, leading(run) :] - leading(run)
            taken = np.take_along_axis(errors, chosen.reshape(-1, 1).numpy(), axis=1)[:, 0]
            row = table[(table["layer"] == index) & (table["router"] == name)].iloc[0]
            assert row["error"] == pytest.approx(taken.sum() / scale, rel=1e-3)
            regret = (taken - errors.min(axis=1)).sum() / scale
            assert row["regret"] == pytest.approx(regret, rel=1e-2, abs=1e-5)
            assert row["best"] == pytest.approx((taken == errors.min(axis=1)).mean(), abs=0.02)
            assert row["experts"] == errors.shape[1]
    assert (table["regret"] >= 0).all()
    oracle = table[table["router"] == "oracle"]
    assert list(oracle["regret"]) == [0] * len(oracle)
    assert list(oracle["best"]) == [1] * len(oracle)
    assert (table.loc[table["router"] == "random", "regret"] > 0).all()


def test_a_row_for_every_layer_and_router_whatever_the_batches(run, choices, table):
    rows = list(table[["layer", "router"]].itertuples(index=False, name=None))
    assert rows == [(layer, name) for layer in choices["cosine"] for name in choices]
    assert "10 images" in table.attrs["caption"]
    whole = measure.router_regret(run, IMAGES, choices)
    numbers = ["error", "regret", "best"]
    np.testing.assert_allclose(whole[numbers], table[numbers], rtol=1e-4, atol=1e-7)


def test_a_layer_with_a_single_expert_has_no_choice(store):
    config = with_one_expert(CONFIGS["best"])
    run = extract(toy_vit(), CALIBRATION, config, store=store)
    assert measure.router_choices(run, CALIBRATION, store=store) == {}
    with pytest.raises(MoeeError, match=r"routers for some of the routed layers.*found none"):
        measure.router_regret(run, IMAGES, {})


def test_only_layers_that_all_routers_know_are_compared(run, choices):
    first, *_ = choices["oracle"]
    some = {"oracle": choices["oracle"], "one": {first: choices["random"][first]}}
    assert set(measure.router_regret(run, IMAGES, some)["layer"]) == {first}
    with pytest.raises(MoeeError, match=r"found strange for \[99\]"):
        measure.router_regret(run, IMAGES, {"strange": {99: ConstantRouter()}})
    with pytest.raises(MoeeError, match="at least one image"):
        measure.router_regret(run, IMAGES.take([]), choices)
