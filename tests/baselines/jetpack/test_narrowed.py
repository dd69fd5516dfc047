from __future__ import annotations

import pytest
import torch

from moee_analysis.baselines.jetpack import JetpackConfig, narrowed, successor
from moee_analysis.errors import MoeeError
from tests.helpers.images import toy_images
from tests.helpers.models import lively, same_models, toy_swin, toy_vit
from tests.helpers.widened import convnext, lively_ones, vit, widened_convnext, widened_vit

IMAGES = toy_images(12)
PLANTED = {
    "vit": (lambda: lively_ones(vit(2)), widened_vit, 16),
    "convnext": (lambda: lively_ones(convnext(16)), widened_convnext, 16),
}


def pixels():
    return next(IMAGES.batches(toy_vit()))


@pytest.fixture(scope="module", params=PLANTED)
def planted(request):
    make, widen, width = PLANTED[request.param]
    narrow = make()
    return narrow, widen(narrow), width


def test_the_wide_models_compute_what_the_narrow_ones_do(planted):
    narrow, wide, _ = planted
    torch.testing.assert_close(wide(pixels()), narrow(pixels()), atol=1e-4, rtol=1e-4)
    assert narrow(pixels()).std(dim=0).mean() > 0.05  # images make a difference


@pytest.mark.parametrize("metric", ["L1", "L2"])  # neurons below 0 matter as well
@pytest.mark.parametrize("method", ["importance", "graph"])
def test_narrowing_finds_all_that_matters(planted, method, metric):
    narrow, wide, width = planted
    config = JetpackConfig(width=width, method=method, metric=metric, head="recycled")
    found = narrowed(wide, IMAGES, config)
    assert not same_models(found, narrow)  # units are in other places
    torch.testing.assert_close(found(pixels()), narrow(pixels()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_blind_methods_miss_it(planted, method):
    narrow, wide, width = planted
    found = narrowed(wide, IMAGES, JetpackConfig(width=width, method=method, head="recycled"))
    assert (found(pixels()) - narrow(pixels())).abs().max() > 0.01


@pytest.mark.parametrize("method", ["importance", "graph", "uniform", "random"])
def test_the_same_width_is_the_same_model(planted, method):
    _, wide, _ = planted
    found = narrowed(wide, IMAGES, JetpackConfig(method=method, head="recycled"))
    assert same_models(found, wide)


def test_a_fresh_head_is_that_of_the_successor():
    wide = toy_vit()
    found = narrowed(wide, IMAGES, JetpackConfig(width=16, num_classes=4, seed=3))
    fresh = successor(wide, 16, num_classes=4, seed=3)
    assert torch.equal(found.head.weight, fresh.head.weight)
    assert not torch.equal(found.blocks[0].mlp.fc1.weight, fresh.blocks[0].mlp.fc1.weight)


# Successors


def test_a_successor_is_narrower_in_everything_and_takes_the_same_images():
    dense = toy_vit()
    small = successor(dense, 16)
    assert (small.embed_dim, small.blocks[0].attn.num_heads) == (16, 1)
    assert small.blocks[0].attn.head_dim == dense.blocks[0].attn.head_dim
    assert small.blocks[0].mlp.fc1.out_features == 32
    assert small(pixels()).shape == dense(pixels()).shape
    assert small.pretrained_cfg["label_names"] == dense.pretrained_cfg["label_names"]
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    small = successor(lively_ones(convnext(32)), 8)  # stages are narrowed alike
    assert [stage.blocks[0].mlp.fc1.in_features for stage in small.stages] == [4, 8, 8, 8]


def test_the_seed_decides_and_torch_random_numbers_go_on():
    state = torch.random.get_rng_state()
    first, again, other = (successor(toy_vit(), 16, seed=seed) for seed in (1, 1, 2))
    assert same_models(first, again)
    assert not same_models(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_classes_have_no_names():
    small = successor(toy_vit(), 16, num_classes=9)
    assert small(pixels()).shape[1] == 9
    assert "label_names" not in small.pretrained_cfg
    assert small.pretrained_cfg["num_classes"] == 9


@pytest.mark.parametrize(
    ("dense", "width", "expected"),
    [
        (toy_swin, 16, "VisionTransformer"),
        (toy_vit, 24, "whole numbers of heads"),
        (toy_vit, 64, "at most 32"),
        (lambda: lively_ones(convnext(32)), 4 + 1, "whole numbers of channels"),
        (lambda: lively(img_size=32, global_pool="map"), None, "plain"),
    ],
)
def test_what_has_no_successor_is_refused(dense, width, expected):
    with pytest.raises(MoeeError, match=expected):
        narrowed(dense(), IMAGES, JetpackConfig(width=width, method="uniform"))
