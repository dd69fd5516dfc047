from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.extraction.record import layer_tokens as layers
from moee_analysis.extraction.record.hooks import TokenPlan
from moee_analysis.extraction.record.layer_tokens import Recomputed, recorded_layer
from moee_analysis.extraction.record.recording import record
from moee_analysis.models.loading import find_mlps
from tests.helpers.planted import PLANTED
from tests.helpers.toys import toy_images, toy_vit


def recorded(root, *, kinds=("inputs",)):
    model = toy_vit()
    plan, sites = TokenPlan(None, 1), find_mlps(model)
    activations = record(model, toy_images(5), sites, plan=plan, root=root, kinds=kinds)
    return [recorded_layer(activations.layer(site), model, site) for site in sites]


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


def test_a_layer_has_its_site_and_its_mlp(tmp_path):
    for layer, block in zip(recorded(tmp_path), toy_vit().blocks, strict=True):
        assert torch.equal(layer.mlp.fc1.weight, block.mlp.fc1.weight)
        assert layer.site.hidden == 64


def test_hidden_activations_of_a_part_are_computed_from_its_own_inputs(tmp_path):
    model, site = toy_vit(), find_mlps(toy_vit())[0]
    sample = record(
        model, toy_images(5), [site], plan=TokenPlan(5, 1), root=tmp_path, kinds=("inputs",)
    ).layer(site)
    whole = recorded_layer(sample, model, site).sample.hidden[slice(None)]
    part = recorded_layer(sample.part(slice(7, 20)), model, site).sample
    np.testing.assert_allclose(part.hidden[np.array([0, 5])], whole[[7, 12]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 89, 90, 1000])
def test_chunks_are_all_rows_one_after_the_other(monkeypatch, chunk):
    monkeypatch.setattr(layers, "CHUNK", chunk)
    chunks = list(PLANTED.chunks())
    assert np.concatenate([np.arange(90)[rows] for rows in chunks]).tolist() == list(range(90))
    assert all(rows.stop - rows.start <= chunk for rows in chunks)
