from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from moee_analysis import partition as partitions
from moee_analysis.clustering import NOISE, ClusterConfig, Clusters
from moee_analysis.fisher import damped, fisher, input_root
from moee_analysis.partition import clustered, divided, metric_root, one_expert, partition
from moee_analysis.recorded import Recorded
from moee_analysis.routers import ConstantRouter, CosineRouter, NearestRouter
from moee_analysis.statistics import statistics_of
from tests.makers import CLUSTERING, MEANS, best, quick, sample_of
from tests.planted import DIM, EAST, LABELS, NORTH, PLANTED, ROWS, SITE, planted

INPUTS = PLANTED.sample.inputs.astype(np.float32)


def made(noise, *, layer=PLANTED, labels=LABELS, rows=ROWS, **settings):
    everything = np.arange(len(layer.sample))
    return divided(layer, everything, rows, Clusters(labels), noise=noise, **settings)


def counted(found):
    """Tokens that each expert's statistics count."""
    return np.bincount(found.members[found.members != NOISE], minlength=found.experts).tolist()


def most_variable(found):
    """Neurons of every expert's tokens, the most variable first."""
    known = statistics_of(PLANTED.sample, lambda rows: found.members[rows], experts=found.experts)
    return np.argsort(-known.variance, axis=1)


# From clusters to experts


def test_experts_start_at_the_mean_inputs_of_their_clusters():
    found = made("drop")
    np.testing.assert_allclose(found.centres[0], INPUTS[:40].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.centres[1], INPUTS[40:60].mean(axis=0), atol=1e-6)
    assert isinstance(found.router(), CosineRouter)
    assert found.noise_share == pytest.approx(30 / 90)
    assert (found.experts, found.reason) == (2, "")


def test_noise_rerouted_counts_for_the_expert_it_is_routed_to():
    found = made("reroute")
    assert counted(found) == [70, 20]
    assert set(most_variable(found)[0, :2]) == {0, 2}


def test_noise_dropped_counts_for_no_statistics_but_is_still_routed():
    found = made("drop")
    assert counted(found) == [40, 20]
    assert most_variable(found)[:, 0].tolist() == [0, 1]
    assert np.bincount(found.routed).tolist() == [70, 20]


def test_noise_as_the_rest_gets_an_expert_of_its_own():
    found = made("rest")
    assert found.experts == 3
    assert most_variable(found)[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.centres[2], INPUTS[60:].mean(axis=0), atol=1e-6)
    assert counted(found) == [40, 20, 30]


def test_without_noise_the_rest_is_no_expert():
    assert made("rest", labels=np.repeat([0, 1], [40, 50])).experts == 2


@pytest.mark.parametrize("noise", ["reroute", "drop", "rest"])
def test_an_expert_that_no_token_is_routed_to_is_left_out(noise):
    # The third cluster lies half to the north and half to the east: its mean is nobody's nearest.
    layer = planted((NORTH, 40, 0), (EAST, 40, 1), (NORTH, 10, 2), (EAST, 10, 2), spread=0)
    labels = np.repeat([0, 2, 1], [40, 40, 20])
    found = made(noise, layer=layer, labels=labels, rows=np.arange(100))
    assert found.experts == len(found.centres) == 2
    assert np.bincount(found.routed).tolist() == [50, 50]
    np.testing.assert_allclose(found.centres @ np.stack([NORTH, EAST]).T, np.eye(2), atol=1e-3)
    assert found.route_agreement == 1.0


def test_a_layer_that_routes_everything_to_one_expert_stays_dense():
    layer = planted((NORTH, 40, 0), (2 * NORTH, 40, 1), spread=0)
    labels = np.repeat([0, 1], 40)
    found = made("reroute", layer=layer, labels=labels, rows=np.arange(80))
    assert found.reason == "all tokens route to one expert"


def test_only_some_rows_need_to_be_clustered():
    rows = np.arange(0, 90, 2)
    assert sum(counted(made("reroute", labels=LABELS[rows], rows=rows))) == 90
    assert counted(made("drop", labels=LABELS[rows], rows=rows)) == [20, 10]


def test_only_candidates_are_routed():
    candidates = np.arange(5, 90)
    rows = candidates[::2]
    for noise, counts in (("reroute", [65, 20]), ("drop", [18, 10])):
        found = divided(PLANTED, candidates, rows, Clusters(LABELS[rows]), noise=noise)
        assert len(found.routed) == len(found.members) == 85
        assert counted(found) == counts
        assert np.bincount(found.routed).tolist() == [65, 20]


def test_route_agreement_is_the_share_of_members_that_come_back():
    labels = LABELS.copy()
    labels[:4] = 1  # four tokens to the north that the activations put with the east
    found = made("drop", labels=labels)
    lengths = np.linalg.norm(found.centres, axis=1)
    nearest = [np.argmax(found.centres @ x / lengths) for x in INPUTS[:60].astype(float)]
    assert found.route_agreement == pytest.approx(np.mean(nearest == labels[:60]))
    assert found.route_agreement < 1


def test_a_single_expert_takes_every_token_and_needs_no_router():
    found = one_expert(7)
    assert found.routed.tolist() == found.members.tolist() == 7 * [0]
    assert found.experts == 1
    assert isinstance(found.router(), ConstantRouter)


# A metric


def test_with_a_metric_every_token_goes_to_the_centre_nearest_after_it():
    root = np.random.default_rng(1).normal(size=(DIM, DIM)).astype(np.float32)
    found = made("rest", root=root)
    points = INPUTS @ root.T
    centres = [points[label == LABELS].mean(axis=0) for label in (0, 1, NOISE)]
    np.testing.assert_allclose(found.centres, centres, atol=1e-5)
    distances = np.linalg.norm(points[:, None] - np.stack(centres), axis=2)
    np.testing.assert_array_equal(found.routed, distances.argmin(axis=1))
    assert isinstance(found.router(), NearestRouter)
    again = found.router()(torch.from_numpy(INPUTS))[:, 0]
    np.testing.assert_array_equal(again, found.routed)


@pytest.fixture
def graded():
    """The planted layer with gradients."""
    gradients = np.random.default_rng(2).normal(size=(2, 90, DIM)).astype(np.float16)
    sample = sample_of(PLANTED.sample.hidden, inputs=PLANTED.sample.inputs, gradients=gradients)
    return Recorded(SITE, PLANTED.mlp, sample, "graded")


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_the_metric_of_the_inputs_is_that_of_the_outputs_up_to_its_scale(graded, metric):
    rows = np.arange(10, 90)
    found = metric_root(graded, rows, best(metric=metric).resolved())
    of_outputs = damped(fisher(graded.sample, rows)) if metric == "fisher" else torch.eye(DIM)
    plain = input_root(PLANTED.mlp, of_outputs.double()).numpy()
    np.testing.assert_allclose(found, plain / plain.diagonal().mean(), rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float32


PROJECTED = replace(MEANS, reduce="pca", components=3)


def test_principal_components_are_those_of_the_inputs_in_the_metric(graded):
    rows = np.arange(10, 90)
    whole = metric_root(graded, rows, best().resolved())
    found = metric_root(graded, rows, best(clustering=PROJECTED).resolved())
    assert found.shape == (3, DIM)
    oracle = PCA(3).fit((INPUTS @ whole.T)[rows]).components_ @ whole
    for component, expected in zip(found[::-1], oracle, strict=True):
        sign = np.sign(component @ expected)
        np.testing.assert_allclose(sign * component, expected, rtol=2e-3, atol=1e-4)


def test_more_components_than_there_are_inputs_are_all_of_them(graded):
    many = replace(PROJECTED, components=DIM + 5)
    found = metric_root(graded, ROWS, best(clustering=many).resolved())
    whole = metric_root(graded, ROWS, best().resolved())
    np.testing.assert_allclose(found.T @ found, whole.T @ whole, rtol=1e-3, atol=1e-5)


def test_how_many_clusters_and_components_suits_the_layer(graded, tmp_path):
    free = replace(PROJECTED, count=None, components=None)
    fitting = free.for_width(SITE.hidden)
    left_open, filled = (best(clustering=c).resolved() for c in (free, fitting))
    root = metric_root(graded, ROWS, left_open)
    np.testing.assert_array_equal(root, metric_root(graded, ROWS, filled))
    found = partition(graded, ROWS, left_open, root=tmp_path / "open")
    again = partition(graded, ROWS, filled, root=tmp_path / "filled")
    np.testing.assert_array_equal(found.routed, again.routed)


@pytest.mark.parametrize("router", ["nearest", "cosine"])
def test_the_nearest_router_looks_where_the_clusters_were_found(graded, tmp_path, router):
    config = best(clustering=PROJECTED, router=router).resolved()
    points = INPUTS @ metric_root(graded, ROWS, config).T
    _, clusters = clustered(graded, ROWS, config, root=tmp_path)
    plain = KMeans(4, n_init=1, max_iter=25, random_state=config.seed).fit_predict(points)
    np.testing.assert_array_equal(clusters.labels, plain)
    found = partition(graded, ROWS, config, root=tmp_path)
    assert found.centres.shape == (4, DIM if router == "cosine" else 3)
    if router == "nearest":
        distances = np.linalg.norm(points[:, None] - found.centres, axis=2)
        np.testing.assert_array_equal(found.routed, distances.argmin(axis=1))


def test_a_metric_of_nothing_is_no_division_by_zero(graded):
    graded.sample.directions[:] = 0
    assert not metric_root(graded, ROWS, best().resolved()).any()


# Clusters in the store


def test_means_are_those_of_the_inputs_in_the_metric(graded, tmp_path):
    config = best(seed=3).resolved()
    rows, clusters = clustered(graded, ROWS, config, root=tmp_path)
    points = INPUTS @ metric_root(graded, ROWS, config).T
    plain = KMeans(4, n_init=1, max_iter=25, random_state=3).fit_predict(points[rows])
    np.testing.assert_array_equal(clusters.labels, plain)


def test_only_candidates_are_clustered_and_at_most_so_many(graded, tmp_path):
    candidates = np.arange(7, 90)
    rows, clusters = clustered(
        graded, candidates, best(cluster_tokens=40).resolved(), root=tmp_path
    )
    assert len(set(rows)) == len(rows) == len(clusters.labels) == 40
    assert set(rows) <= set(candidates)
    everything, _ = clustered(graded, candidates, best().resolved(), root=tmp_path)
    np.testing.assert_array_equal(everything, candidates)


@pytest.mark.parametrize("config", [best(), quick(clustering=CLUSTERING)])
def test_clusters_are_found_again_in_the_store(graded, tmp_path, monkeypatch, config):
    config = config.resolved()
    rows, first = clustered(graded, ROWS, config, root=tmp_path)
    for name in ("labels_of", "reduce_dimensions"):
        monkeypatch.setattr(partitions, name, lambda *_, **__: pytest.fail("again"))
    again_rows, again = clustered(graded, ROWS, config, root=tmp_path)
    np.testing.assert_array_equal(again_rows, rows)
    np.testing.assert_array_equal(again.labels, first.labels)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"cluster_tokens": 50}, {"tokens": "alike"}, {"metric": "outputs"}]
)
def test_what_decides_the_clusters_decides_where_they_are_kept(graded, tmp_path, other):
    clustered(graded, ROWS, best().resolved(), root=tmp_path)
    clustered(graded, ROWS, best(**other).resolved(), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_layer_without_clusters_keeps_its_reason(tmp_path, monkeypatch):
    nothing = Clusters(LABELS, "1 clusters found")
    monkeypatch.setattr(partitions, "clustered", lambda *_, **__: (ROWS, nothing))
    found = partition(PLANTED, ROWS, quick().resolved(), root=tmp_path)
    assert found.reason == "1 clusters found"
    assert found.noise_share == pytest.approx(30 / 90)
    assert found.routed is None


def test_random_centres_are_the_inputs_of_so_many_tokens(tmp_path):
    settings = ClusterConfig(method="random", reduce="none", count=5, min_samples=3)
    config = quick(clustering=settings).resolved()
    found = partition(PLANTED, ROWS, config, root=tmp_path)
    assert 2 <= found.experts <= 5
    assert all((np.abs(INPUTS - centre).max(axis=1) < 1e-6).any() for centre in found.centres)
    assert np.bincount(found.members).sum() == 90
