from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.moefication import MoeficationConfig, convert
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import CosineRouter, TokenKindRouter
from tests.helpers.families import small
from tests.helpers.images import toy_images
from tests.helpers.models import toy_kinds, toy_moe, toy_swin, toy_vit


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def slow_experts(model, images, index):
    """Expert of every token of a layer, one image at a time."""
    layer, seen = moe_layers(model)[index], []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for x in images.batches(model, batch_size=1):
        model(x)
    handle.remove()
    return np.stack([layer.router(x)[:, 0].numpy() for x in seen])


@pytest.mark.parametrize(
    "make", [lambda: toy_moe(toy_vit()), lambda: toy_moe(toy_swin()), lambda: toy_kinds(toy_vit())]
)
@pytest.mark.parametrize("batch_size", [5, 64])
def test_routes_are_those_of_one_image_at_a_time(make, batch_size):
    model, images = make(), toy_images(12)
    routes = measure.routes(model, images, batch_size=batch_size)
    for layer in routes.layers:
        expected = slow_experts(model, images, layer)
        np.testing.assert_array_equal(routes.experts[layer], expected)
        for image, row in enumerate(expected):
            np.testing.assert_array_equal(
                routes.counts[layer][image], np.bincount(row, minlength=4)
            )


def test_facts_of_a_vit():
    routes = measure.routes(toy_moe(toy_vit(), layers={0, 2}), toy_images(12), system="toy")
    assert routes.layers == (0, 2)
    assert routes.system == "toy"
    assert routes.n_images == 12
    assert routes.tokens_per_image == {0: 17, 2: 17}
    assert routes.prefix_tokens == {0: 1, 2: 1}
    assert routes.grid == {0: (4, 4), 2: (4, 4)}
    assert routes.k == {0: 1, 2: 1}
    assert routes.class_names[2] == "cat"
    assert routes.counts[0].dtype == np.int32
    assert routes.experts[0].dtype == np.int16


def test_facts_of_feature_maps():
    routes = measure.routes(toy_moe(toy_swin()), toy_images(6))
    assert routes.tokens_per_image == {0: 64, 1: 16}
    assert routes.prefix_tokens == {0: 0, 1: 0}
    assert routes.grid == {0: (8, 8), 1: (4, 4)}


def test_shares_sum_to_the_experts_per_token():
    images = toy_images(6)
    top1 = measure.routes(toy_moe(toy_vit()), images)
    config = MoeficationConfig(active=3 / 8, n_experts=8, router="centre")
    top3 = measure.routes(convert(toy_vit(), images, config), images)
    assert top1.shares(0).sum() == pytest.approx(1)
    assert top3.shares(0).sum() == pytest.approx(3)
    assert top3.k[0] == 3
    assert not top3.experts


def test_outside_routers_see_what_the_layers_own_would_see():
    model, images = toy_vit(), toy_images(6)
    centres = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    routes = measure.routes(model, images, routers={1: CosineRouter(centres)})
    site, seen = find_mlps(model)[1], []
    handle = site.module(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(next(images.batches(model)))
    handle.remove()
    expected = CosineRouter(centres)(seen[0].reshape(-1, 32)).reshape(6, 17)
    np.testing.assert_array_equal(routes.experts[1], expected)


def test_outside_routers_may_tell_leading_tokens_apart():
    model, images = toy_vit(), toy_images(6)
    inner = CosineRouter(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))
    alone = measure.routes(model, images, routers={1: inner})
    apart = measure.routes(model, images, routers={1: TokenKindRouter((0,), inner, tokens=17)})
    assert (apart.experts[1][:, 0] == 0).all()
    np.testing.assert_array_equal(apart.experts[1][:, 1:], alone.experts[1][:, 1:] + 1)
    assert apart.shares(1)[0] == pytest.approx(1 / 17)


def test_experts_first_chosen_in_a_later_batch_are_counted():
    model, images = toy_vit(), toy_images(12)
    router = CosineRouter(torch.randn(6, 32, generator=torch.Generator().manual_seed(3)))
    small = measure.routes(model, images, routers={0: router}, batch_size=1)
    large = measure.routes(model, images, routers={0: router}, batch_size=12)
    np.testing.assert_array_equal(small.counts[0], large.counts[0])


def test_hooks_come_off():
    model = toy_moe(toy_vit())
    measure.routes(model, toy_images(3))
    assert hooks(model) == 0


def test_hooks_come_off_after_an_error():
    model = toy_moe(toy_vit())
    layer = moe_layers(model)[1]
    layer.router.centres = torch.zeros(2, 7)
    with pytest.raises(RuntimeError):
        measure.routes(model, toy_images(3))
    assert hooks(model) == 0


def test_a_dense_model_has_no_routes():
    with pytest.raises(MoeeError, match="dense VisionTransformer"):
        measure.routes(toy_vit(), toy_images(3))


def test_a_router_for_a_missing_layer_is_refused():
    router = CosineRouter(torch.ones(2, 32))
    with pytest.raises(MoeeError, match="layer 7"):
        measure.routes(toy_vit(), toy_images(3), routers={7: router})


@pytest.mark.parametrize("name", ["small_hiera", "small_mobilevit", "small_nest", "small_tnt"])
def test_patches_are_where_they_are_in_the_image(name):
    model, images, seen = small(name), toy_images(3), []
    site = find_mlps(model)[0]
    centres = torch.randn(4, site.dim, generator=torch.Generator().manual_seed(0))
    router = CosineRouter(centres)
    found = measure.routes(model, images, routers={0: router}, batch_size=2)
    site.module(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.cat(list(images.batches(model))))
    parts = (len(seen[0]) // 3, *seen[0].shape[1:-1])
    chosen = router(seen[0]).reshape(3, -1).numpy()
    np.testing.assert_array_equal(
        found.patch_experts(0), chosen[:, patch_places(model, site.name, parts)]
    )
    assert found.placed == (0,)
