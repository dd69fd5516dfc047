import copy
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import moee_analysis as moee
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import pipeline
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure import macs
from moee_analysis.models.attention import reduced_attentions
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import find_mlps, fingerprint, load_model
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import ConstantRouter
from tests.helpers.images import toy_images
from tests.helpers.models import (
    SMALL_CONVNEXT,
    divergence,
    hooks_of,
    lively,
    pixels_of,
    same_models,
    toy_swin,
    toy_vit,
)
from tests.helpers.runs import CLUSTERING, best, quick

IMAGES = toy_images(16)


# The same as the dense model where nothing is left out


EVERY_NEURON = {"budget": "share", "variance_kept": 1.0}
HARDLY = {"macs_reduction": 1e-6}


@pytest.mark.parametrize(("build", "config"), [
    *((build, quick(variance_kept=1.0, layers=(0, 1)))
      for build in (toy_vit, toy_swin, partial(lively, SMALL_CONVNEXT), load_model)),
    (toy_vit, quick(variance_kept=1.0, attention="low_rank")),
    (toy_vit, best(**EVERY_NEURON)), (toy_swin, best(**EVERY_NEURON)),
    (toy_vit, best(**EVERY_NEURON, refit="shift")), (toy_vit, best(**HARDLY)),
])  # fmt: skip
def test_with_nothing_left_out_the_output_is_that_of_the_dense_model(build, config):
    model = build()
    run = extract(model, IMAGES, config)
    assert any(layer.experts > 1 for layer in run.layers)
    if config == best(**HARDLY):
        assert [set(layer.sizes) for layer in run.layers] == [{64}, {64}, {64, 0}]
    assert len(reduced_attentions(run.model)) == (3 if config.attention == "low_rank" else 0)
    x = pixels_of(model, count=5)
    dense = model(x)
    near = 1e-5 * max(1.0, float(dense.abs().max())) if config.recipe == "paper" else 1e-4
    torch.testing.assert_close(run.model(x), dense, rtol=0 if near < 1e-4 else 1e-4, atol=near)


# What each layer becomes


def test_the_report_tells_what_the_model_is_and_the_dense_one_is_not_changed():
    model = toy_vit()
    run = extract(model, IMAGES, quick(variance_kept=0.3, layers=(0, 2)))
    layers, removed, routers = moe_layers(run.model), 0, 0
    assert set(layers) == {0, 2}
    dense = run.layers[1]
    assert (dense.experts, dense.sizes, dense.active_fraction) == (0, (), 1.0)
    assert (dense.converted, dense.reason) == (False, "not asked for")
    for index, layer in layers.items():
        told = run.layers[index]
        assert (told.converted, told.reason) == (True, "")
        assert told.experts == layer.n_experts == len(told.sizes)
        assert list(told.sizes) == layer.expert_sizes
        assert told.union_fraction == len(layer.kept) / told.hidden < 1
        used = float(layer.shares @ layer.sizes.float()) / told.hidden
        assert told.active_fraction == pytest.approx(used, rel=1e-5)
        assert 0 <= told.noise_share <= CLUSTERING.max_noise
        removed += told.hidden - len(layer.kept)
        routers += layer.router.centres.numel()
    assert count_parameters(run.model) == count_parameters(model) - 65 * removed + routers
    assert fingerprint(model) == fingerprint(toy_vit())
    assert len(find_mlps(model)) == 3
    assert hooks_of(model) == hooks_of(run.model) == 0
    assert run.dense() is model
    assert not torch.allclose(run.model(pixels_of(model)), model(pixels_of(model)))


def test_where_no_clusters_are_found_a_layer_stays_dense_and_says_why():
    model, x = toy_vit(), pixels_of(toy_vit())
    run = extract(model, IMAGES, quick(clustering=replace(CLUSTERING, max_noise=0.001)))
    assert [layer.converted for layer in run.layers] == [False] * 3
    assert all("noise" in layer.reason for layer in run.layers)
    assert torch.equal(run.model(x), model(x))
    model.blocks[1].mlp.fc1.weight.zero_()
    run = extract(model, IMAGES, quick())
    assert [layer.converted for layer in run.layers] == [True, False, True]
    assert run.layers[1].reason == "0 clusters found"


# One expert for all tokens


def test_one_cluster_is_static_pruning_by_variance():
    model = toy_vit()
    run = extract(model, IMAGES, quick(variance_kept=0.6, experts="one"))
    pruned = copy.deepcopy(model)
    for index, layer in moe_layers(run.model).items():
        assert layer.n_experts == 1
        assert layer.expert_neurons(0).tolist() == list(range(len(layer.kept)))  # the union
        assert isinstance(layer.router, ConstantRouter)
        assert layer.macs_per_token() == 2 * 32 * len(layer.kept)
        dropped = np.setdiff1d(np.arange(64), layer.kept)
        pruned.blocks[index].mlp.fc2.weight[:, dropped] = 0
    x = pixels_of(model)
    torch.testing.assert_close(run.model(x), pruned(x), rtol=1e-4, atol=1e-5)
    assert all(told.experts == 1 and told.union_fraction < 1 for told in run.layers)


# A budget


@pytest.mark.parametrize("reduction", [0.1, 0.25])
def test_a_budget_is_met_with_the_largest_possible_experts(reduction):
    model = toy_vit()
    run = extract(model, IMAGES, quick(macs_reduction=reduction))
    more = extract(model, IMAGES, quick(variance_kept=run.variance_kept + 1e-6))
    saved = (1 - reduction) * count(model).total
    total, of_more = (macs(each).iloc[-1]["macs"] for each in (run, more))
    assert 0.97 * saved < total <= saved < of_more


# The recipe "best"


@pytest.mark.parametrize("build", [toy_vit, lively])
def test_patches_that_nothing_reads_get_a_constant_and_no_logit_changes(build):
    model = build()
    last = len(find_mlps(model)) - 1
    run = extract(model, IMAGES, best(macs_reduction=1e-6, layers=(last,)))
    layer, x = moe_layers(run.model)[last], pixels_of(model)
    assert layer.expert_sizes[1] == 0
    torch.testing.assert_close(run.model(x), model(x), rtol=1e-4, atol=1e-4)
    patches = layer(torch.randn(3, layer.router.tokens, layer.fc1.in_features))[:, 1:]
    assert torch.equal(patches, patches[:1, :1].expand_as(patches))


def test_a_refit_comes_closer_to_the_dense_model_than_none_and_than_the_paper():
    model = toy_vit()
    runs = [
        extract(model, IMAGES, best(macs_reduction=0.25, refit=refit)).model
        for refit in ("none", "shift", "shared")
    ]
    far = [divergence(model, moe, IMAGES) for moe in runs]
    assert far == sorted(far, reverse=True)
    assert 0 < far[2] < 0.5 * far[0]
    paper = extract(model, IMAGES, quick(macs_reduction=0.25)).model
    assert far[2] < divergence(model, paper, IMAGES)


# The same again


@pytest.mark.parametrize("settings", [quick, best])
def test_the_same_seed_gives_the_same_run_and_a_store_finds_it(tmp_path, monkeypatch, settings):
    model, config = toy_vit(), settings(seed=3, macs_reduction=0.05, layers=(0, 2))
    plain, first = (extract(model, IMAGES, config, store=store) for store in (None, tmp_path))
    other = extract(model, IMAGES, replace(config, seed=4))
    monkeypatch.setattr(pipeline, "group_tokens", lambda *_, **__: pytest.fail("again"))
    again = extract(model, IMAGES, config, store=tmp_path)
    assert plain.layers == first.layers == again.layers
    assert same_models(plain.model, first.model)
    assert same_models(first.model, again.model)
    assert again.provenance == first.provenance == plain.provenance
    assert again.dense() is model
    assert not same_models(other.model, plain.model)


def test_a_store_keeps_no_run_that_fails_and_without_one_nothing_is_kept(tmp_path, monkeypatch):
    with pytest.raises(MoeeError):
        extract(toy_vit(), IMAGES, quick(macs_reduction=0.99), store=tmp_path / "store")
    kept = [path.name for path in (tmp_path / "store").iterdir()]
    assert not [name for name in kept if "run-" in name or name.startswith(".")]
    monkeypatch.setenv("MOEE_STORE", str(tmp_path / "own"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    extract(toy_vit(), IMAGES, quick())
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# Where it comes from


def test_the_provenance_names_model_images_versions_and_seed():
    model = lively()
    run = extract(model, IMAGES, quick(seed=7, calibration_images=12))
    assert isinstance(run.config, moee.ExtractConfig)
    expected = {
        "model": "test_vit", "weights_sha256": hash_weights(model), "n_images": 12, "seed": 7,
        "images_sha256": IMAGES.limit(12, seed=7).fingerprint,
    }  # fmt: skip
    assert expected.items() <= run.provenance.items()
    libraries = {"moee-analysis", "python", "torch", "timm", "numpy", "hdbscan"}
    assert libraries <= run.provenance["versions"].keys()
    assert run.config.calibration_images == 12


@pytest.mark.parametrize(("change", "words"), [
    (lambda model: model.pretrained_cfg.pop("architecture"), "pretrained_cfg"),
    (lambda model: setattr(model, "lock", threading.Lock()), "a model that can be copied"),
])  # fmt: skip
def test_a_model_that_cannot_be_named_or_copied_is_refused_before_the_work(
    monkeypatch, change, words
):
    change(model := toy_vit())
    monkeypatch.setattr(pipeline, "describe_origin", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(MoeeError, match=words):
        extract(model, IMAGES, quick())


def test_five_lines_are_enough(tmp_path):
    model = moee.load_model("bundled")
    images = moee.load_images("bundled", split="calibration", limit=40)
    run = moee.extract(model, images, quick(macs_reduction=0.02, layers=(0,)))
    run.save(tmp_path / "a")
    assert moee.load(tmp_path / "a").model(torch.zeros(2, 3, 64, 64)).shape == (2, 20)
