import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import (
    ConstantRouter,
    CosineRouter,
    NearestRouter,
    OracleRouter,
    RandomRouter,
)
from tests.helpers.images import toy_images
from tests.helpers.models import same_models, seen_by, toy_kinds, toy_moe, toy_vit
from tests.helpers.runs import best, quick

CALIBRATION, IMAGES = toy_images(24), toy_images(34).take(range(24, 34))
CONFIGS = {
    "paper": quick(macs_reduction=0.1, tokens_per_image=17),
    "best": best(macs_reduction=0.25),  # CLS has an expert of its own
}


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


def inputs_of(run, layer, images=IMAGES):
    """What the layer's MLP sees in the dense model, (images, tokens, dim)."""
    dense = run.original
    ((inputs, _),) = seen_by(find_mlps(dense)[layer].module(dense), dense, images)
    return inputs


def chosen_by(router, x):
    return router(x).reshape(x.shape[:2])


def errors_by_hand(run, index):
    """Dense outputs and squared errors of every routed token, expert by expert, float64."""
    layer, mlp, first = moe_layers(run.model)[index], run.original.blocks[index].mlp, leading(run)
    tokens, errors = inputs_of(run, index)[:, first:].flatten(end_dim=1), []
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


def test_the_oracle_is_no_part_of_a_model_and_pays_for_every_expert():
    model = toy_moe(toy_vit())
    layer, before = moe_layers(model)[0], dict(model.state_dict())
    layer.router = OracleRouter(toy_vit().blocks[0].mlp, layer)
    layer.router(torch.randn(2, 3, 32))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert before.keys() - after.keys() == {"blocks.0.mlp.router.centres"}
    layer = moe_layers(toy_kinds(toy_vit()))[1]
    oracle = OracleRouter(toy_vit().blocks[1].mlp, layer)
    assert (oracle.n_experts, oracle.macs) == (3, 2 * 32 * (64 + 9 + 14 + 0))


def test_there_are_five_routers_for_every_layer_with_a_choice(run, choices):
    assert sorted(choices) == ["constant", "cosine", "nearest", "oracle", "random"]
    layers, first = moe_layers(run.model), leading(run)
    several = [index for index, layer in layers.items() if layer.n_experts - first > 1]
    assert several
    for routers in choices.values():
        assert list(routers) == several
        for index, router in routers.items():
            chosen = chosen_by(router, inputs_of(run, index))
            assert (chosen[:, :first] == 0).all()
            assert (chosen[:, first:] >= first).all()
            assert chosen.max() < layers[index].n_experts
    watched = measure.routes(run.dense(), IMAGES, routers=choices["oracle"])
    for index, oracle in choices["oracle"].items():  # asked while its dense MLP is watched
        chosen = chosen_by(oracle, inputs_of(run, index))
        np.testing.assert_array_equal(watched.experts[index], chosen)


def test_one_is_the_run_s_own_and_the_other_has_the_means_of_what_that_routes(run, choices):
    other, first = {"cosine": "nearest", "nearest": "cosine"}[run.config.router], leading(run)
    for index, router in choices[other].items():
        layer, x = moe_layers(run.model)[index], inputs_of(run, index, CALIBRATION)
        assert same_models(choices[run.config.router][index], layer.router)
        chosen = chosen_by(layer.router, x)[:, first:].flatten() - first
        tokens = x[:, first:].flatten(end_dim=1)
        means = torch.stack([tokens[chosen == e].mean(dim=0) for e in chosen.unique()])
        assert len(means) == layer.n_experts - first
        assert type(inner(router)) is {"cosine": CosineRouter, "nearest": NearestRouter}[other]
        if other == "cosine":
            torch.testing.assert_close(inner(router).centres, means, rtol=2e-3, atol=2e-3)
        else:  # a mean is nearest to itself
            assert inner(router)(means)[:, 0].tolist() == [*range(len(means))]


def test_random_and_constant_follow_the_calibration(run, choices, store):
    for index in choices["random"]:
        random, constant = (inner(choices[name][index]) for name in ("random", "constant"))
        shares = moe_layers(run.model)[index].shares[leading(run) :]
        assert (type(random), random.n_experts) == (RandomRouter, len(shares))
        found = random(torch.randn(20_000, 32))[:, 0].bincount(minlength=len(shares))
        torch.testing.assert_close(found / 20_000, shares / shares.sum(), atol=0.02, rtol=0)
        assert (type(constant), constant.expert) == (ConstantRouter, shares.argmax())
    other = measure.router_choices(run, CALIBRATION, store=store, seed=6)
    one, two = (inner(c["random"][index]).directions for c in (choices, other))
    assert not torch.equal(one, two)


def test_rerouting_changes_the_routers_that_are_given_and_nothing_of_the_run(run, choices):
    before, index = copy.deepcopy(run.model), max(choices["constant"])
    model = measure.rerouted(run, {index: choices["constant"][index]})
    assert same_models(run.model, before)
    assert isinstance(inner(moe_layers(model)[index].router), ConstantRouter)
    moe_layers(model)[index].router = moe_layers(run.model)[index].router
    assert same_models(model, run.model)


def test_errors_and_regrets_are_those_of_one_token_after_the_other(run, choices, table):
    for index in choices["cosine"]:
        wanted, errors = errors_by_hand(run, index)
        scale, least = ((wanted - wanted.mean(axis=0)) ** 2).sum(), errors.min(axis=1)
        rows = table[table["layer"] == index].set_index("router")
        for name, routers in choices.items():
            chosen = chosen_by(routers[index], inputs_of(run, index))[:, leading(run) :]
            taken = errors[np.arange(len(errors)), chosen.flatten().numpy() - leading(run)]
            row, regret = rows.loc[name], (taken - least).sum() / scale
            assert row["error"] == pytest.approx(taken.sum() / scale, rel=1e-3)
            assert row["regret"] == pytest.approx(regret, rel=1e-2, abs=1e-5)
            assert row["best"] == pytest.approx((taken == least).mean(), abs=0.02)
            assert row["experts"] == errors.shape[1]
    rows = list(table[["layer", "router"]].itertuples(index=False, name=None))
    assert rows == [(layer, name) for layer in choices["cosine"] for name in choices]
    assert (table["regret"] >= 0).all()
    by_router = table.set_index("router")
    assert (by_router.loc[["oracle"], ["regret", "best"]] == [0, 1]).all(axis=None)
    assert (by_router.loc[["random"], "regret"] > 0).all()


def test_the_batches_do_not_matter(run, choices, table):
    assert "10 images" in table.attrs["caption"]
    whole = measure.router_regret(run, IMAGES, choices)
    numbers = ["error", "regret", "best"]
    np.testing.assert_allclose(whole[numbers], table[numbers], rtol=1e-4, atol=1e-7)


def test_only_layers_with_a_choice_that_all_routers_know_are_compared(run, choices, store):
    single = extract(toy_vit(), CALIBRATION, replace(CONFIGS["best"], experts="one"), store=store)
    assert measure.router_choices(single, CALIBRATION, store=store) == {}
    first, *_ = choices["oracle"]
    some = {"oracle": choices["oracle"], "one": {first: choices["random"][first]}}
    assert set(measure.router_regret(run, IMAGES, some)["layer"]) == {first}
