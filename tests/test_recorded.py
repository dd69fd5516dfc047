from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.activations import TokenPlan, record
from moee_analysis.models import find_mlps
from moee_analysis.recorded import Recomputed, recorded_layer
from tests.toys import toy_images, toy_swin, toy_vit


def recorded(root, *, model=None, kinds=("inputs",), per_image=None):
    model = model or toy_vit()
    plan, sites = TokenPlan(per_image, 1), find_mlps(model)
    activations = record(model, toy_images(5), sites, plan=plan, root=root, kinds=kinds)
    return [recorded_layer(activations, model, site) for site in sites]


def test_hidden_activations_that_were_not_recorded_are_computed_from_the_inputs(tmp_path):
    written = recorded(tmp_path, kinds=("inputs", "hidden"))
    for known, computed in zip(written, recorded(tmp_path), strict=True):
        assert isinstance(computed.sample.hidden, Recomputed)
        for rows in (slice(3, 9), np.array([0, 20, 84])):
            found = computed.sample.hidden[rows]
            assert found.dtype == np.float32
            half = known.sample.hidden[rows].astype(np.float32)
            np.testing.assert_allclose(found, half, rtol=0.01, atol=0.02)


def test_recomputed_activations_are_those_of_the_mlp():
    mlp, inputs = toy_vit().blocks[0].mlp, np.random.default_rng(0).normal(size=(6, 32))
    found = Recomputed(mlp, inputs.astype(np.float16))[np.array([1, 4])]
    x = torch.from_numpy(inputs.astype(np.float16)[[1, 4]]).float()
    np.testing.assert_allclose(found, mlp.act(mlp.fc1(x)), rtol=1e-6)


def test_recorded_activations_are_not_computed_again(tmp_path):
    for layer in recorded(tmp_path, kinds=("inputs", "hidden")):
        assert isinstance(layer.sample.hidden, np.ndarray)


@pytest.mark.parametrize("per_image", [None, 5])
def test_a_sample_knows_how_many_tokens_an_image_has(tmp_path, per_image):
    vit = recorded(tmp_path, per_image=per_image)
    swin = recorded(tmp_path, model=toy_swin(), per_image=per_image)
    assert [layer.tokens_per_image for layer in vit] == [17, 17, 17]
    assert [layer.tokens_per_image for layer in swin] == [64, 16]
