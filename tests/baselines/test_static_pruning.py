import copy

import numpy as np
import pytest
import torch

from moee_analysis.baselines.static_pruning import BASELINES, prune
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import CHOICES, ExtractConfig
from moee_analysis.extraction.run import load
from moee_analysis.models.capture import capture
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import ConstantRouter, TokenKindRouter
from tests.helpers.images import toy_images
from tests.helpers.models import divergence, lively, pixels_of, same_models, toy_swin, toy_vit
from tests.helpers.runs import cost

IMAGES = toy_images()
FEW = toy_images(8)


def macs_saved(run):
    return 1 - cost(run) / count(run.dense()).total


@pytest.mark.parametrize("bound", [None, 0.15])
@pytest.mark.parametrize("name", BASELINES)
def test_the_budgets_are_met_by_one_expert_of_all_patches(name, bound):
    """Only leading tokens may have another one."""
    run = prune(toy_vit(), IMAGES, name, macs_reduction=0.22, params_reduction=bound)
    step = 0.02 if "attention" in name else 0.003  # heads get 8 of their 16 modes at a time
    assert macs_saved(run) >= 0.22 - 1e-9
    saved = 1 - count_parameters(run.model) / count_parameters(run.dense())
    assert saved >= (bound or 0.001)
    assert bound or macs_saved(run) <= 0.22 + step
    first, second, last = moe_layers(run.model).values()
    for layer in (first, second):
        router = layer.router
        if BASELINES[name]["tokens"] == "kinds":
            assert router.prefix.tolist() == [0]
            router = router.inner
        assert router.n_experts == 1
        assert isinstance(router, ConstantRouter)
    assert isinstance(last.router, TokenKindRouter)  # nothing reads the patches
    assert last.expert_sizes[1] == 0 < last.expert_sizes[0]
    assert all(told.converted for told in run.layers)


@pytest.mark.parametrize("name", BASELINES)
def test_with_next_to_nothing_to_save_the_output_is_that_of_the_dense_model(name):
    model = toy_vit()
    run = prune(model, FEW, name, macs_reduction=1e-6)
    assert [told.sizes[0] for told in run.layers] == [64, 64, 64]
    x = pixels_of(model)
    torch.testing.assert_close(run.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_magnitude_keeps_the_neurons_of_the_largest_weights_and_the_weights_themselves():
    model = toy_vit()
    run = prune(model, IMAGES, "magnitude", macs_reduction=0.2)
    pruned = copy.deepcopy(model)
    for site, layer in zip(find_mlps(model), moe_layers(run.model).values(), strict=True):
        mlp = site.module(model)
        size = mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0)
        dropped = np.setdiff1d(np.arange(64), layer.kept)
        assert size[layer.kept].min() > size[dropped].max()
        site.module(pruned).fc2.weight[:, dropped] = 0
    x = pixels_of(model)
    torch.testing.assert_close(run.model(x), pruned(x), rtol=1e-4, atol=1e-5)


def test_variance_ranks_the_neurons_of_all_layers_together():
    model = toy_vit()
    run = prune(model, IMAGES, "variance + mean shift", macs_reduction=0.2)
    kept = [moe_layers(run.model)[i].kept for i in (0, 1)]
    with capture(model, ["blocks.0.mlp.act", "blocks.1.mlp.act"], "outputs") as seen:
        model(torch.cat(list(IMAGES.batches(model))))
    variances = [out.flatten(0, 1).var(dim=0, correction=0) for out in seen.values()]
    least = min(float(v[k].min()) for v, k in zip(variances, kept, strict=True))
    for v, k in zip(variances, kept, strict=True):
        assert v[np.setdiff1d(np.arange(64), k)].max() < 1.1 * least  # tokens are a sample
    assert moe_layers(run.model)[0].shift is not None


def test_a_network_without_leading_tokens_has_one_expert_in_every_layer():
    run = prune(toy_swin(), FEW, "fisher OBS, CLS apart", macs_reduction=0.2)
    assert [layer.n_experts for layer in moe_layers(run.model).values()] == [1, 1]
    assert 0.2 <= macs_saved(run) < 0.22  # one neuron is almost a point of so small a network


def test_the_fisher_metric_stays_closer_to_the_dense_model(bundled, bundled_images):
    images, far = bundled_images["calibration"].limit(20), {}
    for name in ("magnitude", "fisher OBS"):
        run = prune(bundled, images, name, macs_reduction=0.28, preset="smoke")
        assert macs_saved(run) == pytest.approx(0.28, abs=0.003)
        far[name] = divergence(bundled, run.model, images)
    assert far["fisher OBS"] < 0.5 * far["magnitude"]


@pytest.mark.parametrize("name", ["magnitude", "fisher OBS"])
def test_a_run_is_found_and_loaded_again(name, tmp_path):
    settings = {"macs_reduction": 0.2, "preset": "smoke", "seed": 1, "store": tmp_path / "store"}
    run = prune(lively(), FEW, name, **settings)
    assert any(path.name.startswith("run-") for path in (tmp_path / "store").iterdir())
    run.save(tmp_path / "run")
    for again in (load(tmp_path / "run"), prune(lively(), FEW, name, **settings)):
        assert same_models(again.model, run.model)
        assert again.config == run.config
        assert again.config.seed == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(MoeeError, match=r"parameters reduction of 40\.0%") as error:
        prune(toy_vit(), IMAGES, "magnitude", macs_reduction=0.1, params_reduction=0.4)
    assert "at a MACs reduction of 10.0%" in error.value.found
    with pytest.raises(MoeeError, match="fisher OBS") as error:
        prune(toy_vit(), IMAGES, "taylor", macs_reduction=0.2)
    assert all(name in error.value.expected for name in BASELINES)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_rests_on_the_recipe(name):
    of_recipe = {choice for choice in CHOICES if getattr(ExtractConfig(), choice) is None}
    assert of_recipe - set(BASELINES[name]) == {"router"}  # a single expert needs none
