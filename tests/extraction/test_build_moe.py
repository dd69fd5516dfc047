from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.experts.refit_w2 import RefitAccumulator
from moee_analysis.extraction.pipeline import build_moe, group_tokens
from moee_analysis.extraction.record.token_source import Limits, calibration_tokens
from moee_analysis.extraction.record.tokens import capture_mlps
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import same_models, toy_vit
from tests.helpers.runs import best

IMAGES, LITTLE = toy_images(12), Limits(memory=1)
SITES = {site.index: site for site in find_mlps(toy_vit())}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model, experts of its layers 0 and 1, and a function that builds them."""
    root, model = tmp_path_factory.mktemp("store"), toy_vit()
    config = best(metric="outputs", layers=(0, 1)).resolved()
    tokens = calibration_tokens(model, IMAGES, config, root=root)
    layers = group_tokens(tokens, config)

    def build(kept, *, refit="shared", limits=None):
        limited = replace(tokens, limits=limits or Limits())
        return build_moe(limited, layers, kept(layers), refit=refit)

    return model, layers, build


def at_random(layers):
    """Half of the neurons of every expert."""
    rng, layers = np.random.default_rng(0), [layer for layer in layers if layer.converted]
    return {each.site.name: rng.random(each.statistics.means.shape) < 0.5 for each in layers}


def nothing(layers):
    return {name: np.zeros_like(mask) for name, mask in at_random(layers).items()}


def errors_by_expert(model, layer, index):
    """Errors of a layer's outputs on the calibration images, (n, dim) for every expert."""
    site = SITES[index]
    with capture_mlps(model, [site]) as captured, torch.inference_mode():
        model(torch.cat(list(IMAGES.batches(model))))
    inputs = captured[site.name]["inputs"]
    wrong = (layer(inputs) - site.module(model)(inputs)).flatten(0, 1)
    chosen = layer.router(inputs)[:, 0]
    return [wrong[chosen == expert] for expert in range(layer.n_experts)]


@pytest.mark.parametrize("refit", ["shift", "shared"])
@pytest.mark.parametrize("kept", [at_random, nothing])
def test_the_mean_output_of_every_expert_is_that_of_the_dense_layer(built, kept, refit):
    model, layers, build = built
    masks = kept(layers)
    assert not build(kept, refit="none").training
    for index, layer in moe_layers(build(kept, refit=refit)).items():
        own = [layer.kept[layer.expert_neurons(e)].tolist() for e in range(layer.n_experts)]
        assert own == [np.flatnonzero(row).tolist() for row in masks[f"blocks.{index}.mlp"]]
        for wrong in errors_by_expert(model, layer, index):
            torch.testing.assert_close(wrong.mean(dim=0), torch.zeros(32), rtol=0, atol=0.01)
        assert layer.fc2.weight.shape[1] == len(layer.kept)
        assert layer.shift.shape == (layer.n_experts, 32)
    assert same_models(build(kept, refit=refit), build(kept, refit=refit, limits=LITTLE))


def test_an_expert_counts_by_its_tokens_and_by_how_much_their_errors_do(built):
    _, (layer, *_), _ = built
    shares, experts = layer.statistics.shares, layer.assignment.experts
    scale = np.arange(1.0, 1 + experts)
    metrics = scale[:, None, None] * np.eye(32, dtype="f4")
    weighted = replace(layer, statistics=replace(layer.statistics, metrics=metrics))
    kept, mlp = at_random([layer])[layer.site.name], layer.site.module(toy_vit())
    found = RefitAccumulator.of(weighted, kept, mlp)
    # all of its tokens together count its share of an image's tokens, times what an error counts
    np.testing.assert_allclose(found.weights * layer.statistics.weight, 17 * shares * scale)
