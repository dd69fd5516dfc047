import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import CosineRouter, TokenKindRouter
from tests.helpers.families import small
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, seen_by, toy_kinds, toy_moe, toy_swin, toy_vit

IMAGES = toy_images(12)


def cosine_router(experts, dim=32):
    return CosineRouter(torch.randn(experts, dim, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("make", [
    lambda: toy_moe(toy_vit()), lambda: toy_moe(toy_swin()), lambda: toy_kinds(toy_vit()),
], ids=["vit", "swin", "kinds"])  # fmt: skip
@pytest.mark.parametrize("batch_size", [5, 64])
def test_routes_are_those_of_one_image_at_a_time(make, batch_size):
    model = make()
    routes = measure.routes(model, IMAGES, batch_size=batch_size)
    for index, layer in moe_layers(model).items():
        seen = seen_by(layer, model, IMAGES, batch_size=1)
        chosen = [layer.router(x)[:, 0].numpy() for x, _ in seen]
        np.testing.assert_array_equal(routes.experts[index], chosen)
        counts = [np.bincount(row, minlength=4) for row in chosen]
        np.testing.assert_array_equal(routes.counts[index], counts)
        assert routes.shares(index).sum() == pytest.approx(1)
    assert hooks_of(model) == 0


def test_facts_of_a_vit_and_of_feature_maps():
    routes = measure.routes(toy_moe(toy_vit(), layers={0, 2}), IMAGES, system="toy")
    assert routes.layers == (0, 2)
    assert (routes.system, routes.n_images, routes.class_names[2]) == ("toy", 12, "cat")
    assert routes.tokens_per_image == {0: 17, 2: 17}
    assert routes.prefix_tokens == routes.k == {0: 1, 2: 1}
    assert routes.grid == {0: (4, 4), 2: (4, 4)}
    assert (routes.counts[0].dtype, routes.experts[0].dtype) == (np.int32, np.int16)
    maps = measure.routes(toy_moe(toy_swin()), IMAGES)
    assert maps.tokens_per_image == {0: 64, 1: 16}
    assert maps.prefix_tokens == {0: 0, 1: 0}
    assert maps.grid == {0: (8, 8), 1: (4, 4)}


def test_outside_routers_see_the_same_as_the_layers_own_in_batches_of_any_size():
    model, router = toy_vit(), cosine_router(6)
    ((seen, _),) = seen_by(find_mlps(model)[1].module(model), model, IMAGES)
    routes = measure.routes(model, IMAGES, routers={1: router})
    np.testing.assert_array_equal(routes.experts[1], router(seen).reshape(12, 17))
    apart = measure.routes(model, IMAGES, routers={1: TokenKindRouter((0,), router, tokens=17)})
    assert (apart.experts[1][:, 0] == 0).all()
    np.testing.assert_array_equal(apart.experts[1][:, 1:], routes.experts[1][:, 1:] + 1)
    assert apart.shares(1)[0] == pytest.approx(1 / 17)
    # experts that are first chosen in a later batch are counted too
    single = measure.routes(model, IMAGES, routers={1: router}, batch_size=1)
    np.testing.assert_array_equal(single.counts[1], routes.counts[1])


@pytest.mark.parametrize("name", ["small_hiera", "small_mobilevit", "small_nest", "small_tnt"])
def test_patches_are_where_they_are_in_the_image(name):
    model, images = small(name), toy_images(3)
    site = find_mlps(model)[0]
    router = cosine_router(4, site.dim)
    found = measure.routes(model, images, routers={0: router}, batch_size=2)
    ((seen, _),) = seen_by(site.module(model), model, images)
    places = patch_places(model, site.name, (len(seen) // 3, *seen.shape[1:-1]))
    chosen = router(seen).reshape(3, -1).numpy()
    np.testing.assert_array_equal(found.patch_experts(0), chosen[:, places])
    assert found.placed == (0,)
