from __future__ import annotations

import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.routing.cluster_embedding import _shuffled_components
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_vit
from tests.helpers.runs import best, quick


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return extract(lively(), toy_images(), quick(), store=store), store


def test_surrogates_keep_the_covariance_and_nothing_else():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 3
    points[:200] += 10
    made = _shuffled_components(points, rng)
    np.testing.assert_allclose(made.mean(axis=0), points.mean(axis=0), atol=1e-9)
    apart = np.abs(np.cov(made.T) - np.cov(points.T)).max()
    assert apart < 0.2 * np.abs(np.cov(points.T)).max()
    assert not np.allclose(made, points)


def test_surrogate_stands_beside_what_the_run_found(stored):
    run, store = stored
    table = measure.surrogate(run, toy_images(), layers=[0], store=store)
    assert list(table["data"]) == ["activations", "surrogate"]
    found = table.set_index("data").loc["activations"]
    own = run.layers[0]
    assert found["noise_share"] == pytest.approx(own.noise_share)
    assert not own.converted or found["clusters"] >= own.experts


def test_the_clusters_of_the_best_recipe_are_those_of_its_patches(tmp_path):
    run = extract(toy_vit(), toy_images(8), best(macs_reduction=0.2), store=tmp_path)
    table = measure.surrogate(run, toy_images(8), layers=[1], store=tmp_path)
    found = table.set_index("data").loc["activations"]
    assert found["clusters"] == run.layers[1].experts - 1
    assert found["tokens"] == 8 * 16


def test_layers_table_tells_what_became_of_every_layer(stored):
    run, _ = stored
    table = measure.layers(run)
    assert list(table["index"]) == [layer.index for layer in run.layers]
    assert list(table["experts"]) == [layer.experts for layer in run.layers]
