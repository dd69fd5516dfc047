from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.build import build_moe, refit_tally
from moee_analysis.extraction.plan import plan_layers
from moee_analysis.extraction.record.calibration_set import Calibration, Limits
from moee_analysis.extraction.record.hooks import recording
from moee_analysis.models.loading import find_mlps, fingerprint
from moee_analysis.moe.layer import MoeMlp, moe_layers
from tests.helpers.makers import best, pixels_of, same_models
from tests.helpers.toys import toy_images, toy_vit

IMAGES = toy_images(12)
REFITS = ("none", "shift", "shared", "each")
SITES = {site.index: site for site in find_mlps(toy_vit())}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function that builds the layers 0 and 1 with given neurons and refit."""
    root, model = tmp_path_factory.mktemp("store"), toy_vit()
    config = best(metric="outputs", layers=(0, 1)).resolved()
    plans = plan_layers(Calibration(model, IMAGES, config, root))

    def build(kept, *, limits=None, **pieces):
        chosen = best(metric="outputs", layers=(0, 1), **pieces).resolved()
        calibration = Calibration(model, IMAGES, chosen, root, limits or Limits())
        return build_moe(calibration, plans, kept(plans))

    return model, plans, build


def at_random(plans):
    """Half of the neurons of every expert."""
    rng = np.random.default_rng(0)
    return {p.site.name: rng.random(p.scores.neurons.shape) < 0.5 for p in plans if p.converted}


def everything(plans):
    return {name: np.ones_like(mask) for name, mask in at_random(plans).items()}


def nothing(plans):
    return {name: np.zeros_like(mask) for name, mask in at_random(plans).items()}


def inputs_of(model, index):
    """Inputs of one MLP for all images, (images, tokens, dim)."""
    x = torch.cat(list(IMAGES.batches(model)))
    with recording(model, [SITES[index]]) as captured, torch.inference_mode():
        model(x)
    return captured[SITES[index].name].inputs


def error(model, moe, index):
    """Squared error of one layer's outputs per token of the calibration images."""
    inputs = inputs_of(model, index)
    wrong = moe_layers(moe)[index](inputs) - SITES[index].module(model)(inputs)
    return float(wrong.square().sum(dim=-1).mean())


def test_experts_are_the_neurons_that_were_chosen(built):
    _, plans, build = built
    moe = build(at_random)
    assert list(moe_layers(moe)) == [0, 1]
    for index, layer in moe_layers(moe).items():
        mask = at_random(plans)[f"blocks.{index}.mlp"]
        kept = [layer.kept[layer.expert_neurons(e)].tolist() for e in range(layer.n_experts)]
        assert kept == [np.flatnonzero(row).tolist() for row in mask]
        np.testing.assert_allclose(layer.shares, plans[index].shares, rtol=1e-6)


def test_the_dense_model_is_left_as_it_was(built):
    model, _, build = built
    before = fingerprint(model)
    moe = build(at_random)
    assert fingerprint(model) == before == fingerprint(toy_vit())
    assert not any(isinstance(module, MoeMlp) for module in model.modules())
    assert not moe.training


@pytest.mark.parametrize("refit", REFITS)
def test_with_all_neurons_kept_a_layer_is_the_dense_one(built, refit):
    model, _, build = built
    moe, x = build(everything, refit=refit), pixels_of(model)
    torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_more_is_refitted_the_closer_is_the_layer(built, layer):
    model, _, build = built
    errors = [error(model, build(at_random, refit=refit), layer) for refit in REFITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[3]


@pytest.mark.parametrize("refit", REFITS[1:])
def test_the_mean_output_of_every_expert_is_that_of_the_dense_layer(built, refit):
    model, _, build = built
    moe = build(at_random, refit=refit)
    for index, layer in moe_layers(moe).items():
        inputs = inputs_of(model, index)
        chosen = layer.router(inputs)[:, 0]
        wrong = (layer(inputs) - SITES[index].module(model)(inputs)).flatten(0, 1)
        for expert in range(layer.n_experts):
            mean = wrong[chosen == expert].mean(dim=0)
            torch.testing.assert_close(mean, torch.zeros(32), rtol=0, atol=0.01)


@pytest.mark.parametrize("refit", REFITS[1:])
def test_a_layer_without_neurons_gives_every_expert_s_mean_output(built, refit):
    model, _, build = built
    layer = moe_layers(build(nothing, refit=refit))[1]
    inputs = inputs_of(model, 1)
    chosen = layer.router(inputs)[:, 0]
    dense = SITES[1].module(model)(inputs).flatten(0, 1)
    for expert in range(layer.n_experts):
        mean = dense[chosen == expert].mean(dim=0)
        outputs = layer(inputs).flatten(0, 1)[chosen == expert]
        torch.testing.assert_close(outputs, mean.expand_as(outputs), rtol=0, atol=0.01)


def test_without_a_refit_the_output_weights_are_the_dense_ones(built):
    model, _, build = built
    for index, layer in moe_layers(build(at_random, refit="none")).items():
        dense = model.blocks[index].mlp.fc2
        assert layer.shift is None
        torch.testing.assert_close(layer.fc2.weight, dense.weight[:, layer.kept])
        torch.testing.assert_close(layer.fc2.bias, dense.bias)


def test_only_a_refit_each_stores_the_output_weights_of_every_expert(built):
    _, _, build = built
    for refit, single in (("shift", True), ("shared", True), ("each", False)):
        for layer in moe_layers(build(at_random, refit=refit)).values():
            columns = len(layer.kept) if single else sum(layer.expert_sizes)
            assert layer.fc2.weight.shape[1] == columns
            assert layer.shift.shape == (layer.n_experts, 32)


@pytest.mark.parametrize("refit", ["shared", "each"])
def test_a_refit_does_not_depend_on_what_it_may_take_of_memory(built, refit):
    _, _, build = built
    roomy, narrow = (
        build(at_random, refit=refit, limits=Limits(memory=memory)) for memory in (1e9, 1)
    )
    assert same_models(roomy, narrow)


def test_an_expert_counts_by_its_tokens_and_by_how_much_their_errors_do(built):
    _, plans, _ = built
    plan = plans[0]
    weight = np.arange(1.0, 1 + len(plan.shares))
    tally = refit_tally(
        replace(plan, scores=replace(plan.scores, weight=weight)), at_random(plans)[plan.site.name]
    )
    # what all of its tokens count, is its share of an image's tokens times what an error counts
    np.testing.assert_allclose(tally.weights * plan.known.weight, 17 * plan.shares * weight)
