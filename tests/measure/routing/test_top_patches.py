import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, seen_by, toy_kinds, toy_moe, toy_swin, toy_vit

IMAGES = toy_images(12)
MODELS = {"vit": toy_moe(toy_vit()), "swin": toy_moe(toy_swin()), "kinds": toy_kinds(toy_vit())}


@pytest.fixture(scope="module", params=MODELS)
def seen(request):
    """A model, its routes and its typical tokens."""
    model = MODELS[request.param]
    routed = measure.routes(model, IMAGES)
    return model, routed, measure.typical(model, IMAGES, routed)


def slow_tokens(model, layer):
    """Inputs of a routed layer and their experts, one image at a time: (n, dim) and (n,)."""
    module = moe_layers(model)[layer]
    inputs = [x for x, _ in seen_by(module, model, IMAGES, batch_size=1)]
    experts = [module.router(x)[:, 0].numpy() for x in inputs]
    tokens = torch.cat([x.flatten(0, -2) for x in inputs]).double().numpy()
    return tokens, np.concatenate(experts)


def test_means_and_cosines_are_those_of_a_slow_loop(seen):
    model, routed, known = seen
    for layer in routed.layers:
        inputs, experts = slow_tokens(model, layer)
        common = inputs.mean(axis=0)
        np.testing.assert_allclose(known.common[layer], common, atol=1e-5)
        for expert in np.unique(experts):
            mean = inputs[experts == expert].mean(axis=0)
            np.testing.assert_allclose(known.means[layer][expert], mean, atol=1e-5)
            own = inputs[experts == expert] - common
            lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(mean - common)
            found = known.cosines[layer][routed.experts[layer] == expert]
            expected = own @ (mean - common) / lengths
            np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-4)
        unused = routed.counts[layer].sum(axis=0) == 0
        assert (np.isnan(known.means[layer]).all(axis=1) == unused).all()
        assert np.isfinite(known.cosines[layer]).all()
    assert hooks_of(model) == 0


def test_top_patches_are_the_nearest_of_an_expert_one_an_image(seen):
    model, routed, known = seen
    table = measure.top_patches(model, IMAGES, routed=routed, known=known, count=5)
    for (layer, expert), rows in table.groupby(["layer", "expert"]):
        experts = routed.patch_experts(layer)
        assert (experts[rows["image"], rows["row"], rows["column"]] == expert).all()
        assert rows["image"].is_unique
        assert list(rows["cosine"]) == sorted(rows["cosine"], reverse=True)
        patches = known.cosines[layer][:, routed.prefix_tokens[layer] :]
        own = experts.reshape(len(IMAGES), -1) == expert
        assert rows["cosine"].iloc[0] == patches[own].max()
        assert rows["images"].iloc[0] == own.any(axis=1).sum()
        assert rows["share"].iloc[0] == pytest.approx(own.mean())
        assert len(rows) == min(5, own.any(axis=1).sum())


def test_routes_need_not_be_known():
    model = MODELS["vit"]
    first = measure.top_patches(model, IMAGES, layers=[0])
    assert set(first["layer"]) == {0}
    routed = measure.routes(model, IMAGES)
    assert first.equals(measure.top_patches(model, IMAGES, layers=[0], routed=routed))
