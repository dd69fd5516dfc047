from dataclasses import replace
from functools import cache

import pytest
import torch

from moee_analysis.baselines.controls import (
    random_centres,
    randomly_routed,
    statically_pruned,
    with_random_centres,
)
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter, RandomRouter
from tests.helpers.images import toy_images
from tests.helpers.models import pixels_of, toy_kinds, toy_vit
from tests.helpers.runs import CLUSTERING, best, cost, quick

IMAGES = toy_images()


@cache
def taken_apart(config):
    return extract(toy_vit(), IMAGES, config)


@pytest.fixture(scope="module")
def run():
    return taken_apart(quick(macs_reduction=0.2, layers=(0, 2)))


def test_random_routing_changes_only_who_gets_which_expert_and_has_a_seed(run):
    control, x = randomly_routed(run), pixels_of(run.model)
    for index, layer in moe_layers(control).items():
        own = moe_layers(run.model)[index]
        assert isinstance(layer.router, RandomRouter)
        assert isinstance(own.router, CosineRouter)  # the run itself is left alone
        assert layer.expert_sizes == own.expert_sizes
        assert torch.equal(layer.fc1.weight, own.fc1.weight)
        chosen = layer.router(torch.randn(20_000, 32))[:, 0]
        found = torch.bincount(chosen, minlength=layer.n_experts) / 20_000
        torch.testing.assert_close(found, layer.shares, atol=0.02, rtol=0)
    assert not torch.allclose(control(x), run.model(x))
    assert torch.equal(randomly_routed(run)(x), control(x))
    assert not torch.equal(randomly_routed(run, seed=1)(x), control(x))


def test_random_routing_leaves_leading_tokens_with_their_experts(run):
    kinds = replace(run, model=toy_kinds(toy_vit()))
    for index, layer in moe_layers(randomly_routed(kinds)).items():
        own, x = moe_layers(kinds.model)[index], torch.randn(2000, 17, 32)
        chosen = layer.router(x).reshape(2000, 17)
        assert (chosen[:, 0] == 0).all()
        found = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        torch.testing.assert_close(found, own.shares, atol=0.02, rtol=0)
        assert not torch.equal(chosen.flatten(), own.router(x).flatten())
        assert (layer.router.n_experts, layer.router.tokens, layer.router.macs) == (4, 17, 0)
        assert torch.equal(layer.shift, own.shift)


def test_static_pruning_meets_the_same_budget_in_the_same_layers(run):
    pruned = statically_pruned(run, IMAGES)
    assert [p.converted for p in pruned.layers] == [p.converted for p in run.layers]
    assert all(layer.n_experts == 1 for layer in moe_layers(pruned.model).values())
    budget = 0.8 * count(run.dense()).total
    assert 0.97 * budget < cost(pruned) <= budget
    assert count_parameters(pruned.model) < count_parameters(run.model)


@pytest.mark.parametrize("config", [
    quick(variance_kept=0.7), best(macs_reduction=0.2), best(params_reduction=0.15),
    best(budget="share", macs_reduction=0.2), best(budget="share", variance_kept=0.8),
])  # fmt: skip
def test_static_pruning_meets_the_macs_of_a_run_with_any_budget(config):
    run = taken_apart(config)
    pruned = statically_pruned(run, IMAGES)
    more = 1e-2 if config.recipe == "best" else 1e-9
    assert 0.97 * cost(run) < cost(pruned) <= cost(run) * (1 + more)
    if config.recipe == "best":
        for layer in moe_layers(pruned.model).values():
            assert isinstance(layer.router.inner, ConstantRouter)
            assert layer.n_experts == 2  # one of CLS, one of all patches


def test_random_routing_of_the_best_recipe_keeps_cls_and_constants():
    layers = moe_layers(randomly_routed(taken_apart(best(macs_reduction=0.2))))
    assert [layer.router.prefix.tolist() for layer in layers.values()] == 3 * [[0]]
    kinds = [type(layer.router.inner) for layer in layers.values()]
    assert kinds == [RandomRouter, RandomRouter, ConstantRouter]


def test_a_run_that_saves_nothing_is_pruned_by_nothing_and_one_without_experts_is_refused():
    run = taken_apart(quick(variance_kept=1.0))
    x = pixels_of(run.model)
    pruned = statically_pruned(run, IMAGES).model
    torch.testing.assert_close(pruned(x), run.dense()(x), rtol=1e-4, atol=1e-5)
    nothing = quick(clustering=replace(CLUSTERING, max_noise=0.001))
    with pytest.raises(MoeeError, match="every layer dense"):
        statically_pruned(taken_apart(nothing), IMAGES)


def test_random_centres_are_as_many_as_experts_by_the_seed(run, tmp_path):
    first, again, other = (random_centres(run, IMAGES, store=tmp_path, seed=s) for s in (0, 0, 1))
    for index, layer in moe_layers(run.model).items():
        assert first[index].n_experts == layer.n_experts
        assert torch.equal(first[index].centres, again[index].centres)
        assert not torch.equal(first[index].centres, other[index].centres)


@pytest.mark.parametrize("settings", [quick, best])
def test_with_random_centres_only_the_clusters_are_other_ones(settings):
    config = settings(macs_reduction=0.2, noise="drop")
    control = with_random_centres(config)
    assert control.clustering.method == "random"
    assert control.noise == "reroute"  # a token that is no centre is no noise
    assert replace(control, clustering=config.clustering, noise="drop") == config
    assert control.clustering.count == config.resolved().clustering.count
    if settings is best:
        run = taken_apart(control)
        budget = 0.8 * count(run.dense()).total
        assert 0.97 * budget < cost(run) <= budget
        assert isinstance(moe_layers(run.model)[0].router.inner, NearestRouter)
        assert moe_layers(run.model)[0].n_experts == 1 + config.clustering.count


def test_with_one_expert_is_static_pruning_by_the_same_rule():
    config = best(macs_reduction=0.2)
    control = taken_apart(replace(config, experts="one")).model
    pruned = statically_pruned(taken_apart(config), IMAGES).model
    torch.testing.assert_close(control(pixels_of(control)), pruned(pixels_of(control)))
    assert all(layer.n_experts == 2 for layer in moe_layers(control).values())
