import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.routing.cluster_embedding import _shuffle_components
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.helpers.runs import best, quick


def test_surrogates_keep_the_covariance_and_nothing_else():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 3
    points[:200] += 10
    made = _shuffle_components(points, rng)
    np.testing.assert_allclose(made.mean(axis=0), points.mean(axis=0), atol=1e-9)
    apart = np.abs(np.cov(made.T) - np.cov(points.T)).max()
    assert apart < 0.2 * np.abs(np.cov(points.T)).max()
    assert not np.allclose(made, points)


@pytest.mark.parametrize("config", [quick(), best(macs_reduction=0.2)], ids=["paper", "best"])
def test_the_surrogate_stands_beside_the_clusters_of_the_run(tmp_path, config):
    run = extract(toy_vit(depth=2), toy_images(8), config, store=tmp_path)
    table = measure.surrogate(run, toy_images(8), layers=[1], store=tmp_path)
    assert list(table["data"]) == ["activations", "surrogate"]
    found, own = table.iloc[0], run.layers[1]
    if config.recipe == "best":  # of its patches; CLS has an expert of its own
        assert (found["clusters"], found["tokens"]) == (own.experts - 1, 8 * 16)
    else:
        assert found["noise_share"] == pytest.approx(own.noise_share)
        assert not own.converted or found["clusters"] >= own.experts


def test_the_table_of_layers_has_the_fate_of_each(small_run):
    table = measure.layers(small_run)
    assert list(table["index"]) == [layer.index for layer in small_run.layers]
    assert list(table["experts"]) == [layer.experts for layer in small_run.layers]
