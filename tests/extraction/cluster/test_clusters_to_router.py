from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from moee_analysis.extraction.cluster import clusters_to_router as partitions
from moee_analysis.extraction.cluster.assignment import Assignment
from moee_analysis.extraction.cluster.clustering import NOISE, ClusterConfig, Clusters
from moee_analysis.extraction.cluster.clusters_to_router import (
    Partition,
    clustered,
    divided,
    metric_root,
    partition,
    trusted,
)
from moee_analysis.extraction.experts.expert_statistics import ExpertTally, statistics_of
from moee_analysis.extraction.record.accumulate import summed_alone
from moee_analysis.extraction.record.fisher import damped, input_root
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter
from tests.helpers.layers import DIM, EAST, LABELS, NORTH, PLANTED, ROWS, SITE, draw_from, planted
from tests.helpers.runs import CLUSTERING, MEANS, best, quick

INPUTS = PLANTED.sample.inputs.astype(np.float32)


def made(noise, *, layer=PLANTED, labels=LABELS, rows=ROWS, leading=0, **settings):
    draw = draw_from(layer, rows, leading=leading)
    return divided(draw, Clusters(labels), noise=noise, **settings)


def routed(found, layer=PLANTED):
    """Tokens that each expert gets."""
    return np.bincount(found.routed(layer.sample.inputs), minlength=found.experts).tolist()


def counted(found, layer=PLANTED, *, leading=0):
    """Tokens that each expert's statistics count, leading ones aside."""
    _, members = Assignment((0,) * leading, found).of(layer)
    own = members[(members != NOISE) & (layer.sample.position >= leading)]
    return np.bincount(own - bool(leading), minlength=found.experts).tolist()


def alive(found, layer):
    """The same without experts that get no tokens."""
    return Assignment((), found).alive(np.array(routed(found, layer))).partition


def most_variable(found):
    """Neurons of every expert's tokens, the most variable first."""
    tally = ExpertTally(SITE, Assignment((), found), gradients=False)
    known = statistics_of(tally, summed_alone(tally, PLANTED))
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
    assert routed(found) == [70, 20]


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
    whole = made(noise, layer=layer, labels=labels, rows=np.arange(100))
    assert routed(whole, layer) == [50, 0, 50]
    assert whole.route_agreement == pytest.approx(0.8)  # those 20 tokens do not come back
    found = alive(whole, layer)
    assert found.experts == len(found.centres) == 2
    assert routed(found, layer) == [50, 50]
    assert counted(found, layer) == ([50, 50] if noise == "reroute" else [40, 40])
    np.testing.assert_allclose(found.centres @ np.stack([NORTH, EAST]).T, np.eye(2), atol=1e-3)
    assert found.route_agreement == whole.route_agreement


def test_a_layer_that_routes_everything_to_one_expert_stays_dense():
    layer = planted((NORTH, 40, 0), (2 * NORTH, 40, 1), spread=0)
    labels = np.repeat([0, 1], 40)
    found = made("reroute", layer=layer, labels=labels, rows=np.arange(80))
    assert alive(found, layer).reason == "all tokens route to one expert"


def test_only_some_rows_need_to_be_clustered():
    rows = np.arange(0, 90, 2)
    assert sum(counted(made("reroute", labels=LABELS[rows], rows=rows))) == 90
    assert counted(made("drop", labels=LABELS[rows], rows=rows)) == [20, 10]


def test_leading_tokens_are_neither_clustered_nor_counted():
    rows = np.arange(5, 90)[::2]
    for noise, counts in (("reroute", [65, 20]), ("drop", [18, 10])):
        found = made(noise, labels=LABELS[rows], rows=rows, leading=5)
        assert counted(found, leading=5) == counts
        assert np.bincount(found.routed(INPUTS[5:])).tolist() == [65, 20]


def test_route_agreement_is_the_share_of_members_that_come_back():
    labels = LABELS.copy()
    labels[:4] = 1  # four tokens to the north that the activations put with the east
    found = made("drop", labels=labels)
    lengths = np.linalg.norm(found.centres, axis=1)
    nearest = [np.argmax(found.centres @ x / lengths) for x in INPUTS[:60].astype(float)]
    assert found.route_agreement == pytest.approx(np.mean(nearest == labels[:60]))
    assert found.route_agreement < 1


def test_a_single_expert_takes_every_token_and_needs_no_router():
    found = Partition()
    assert found.routed(INPUTS[:7]).tolist() == 7 * [0]
    assert found.members(np.zeros(7, dtype=int), np.arange(7)).tolist() == 7 * [0]
    assert found.experts == 1
    assert isinstance(found.router(), ConstantRouter)


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_tokens_are_routed_in_chunks_and_none_are_routed_at_all(monkeypatch, chunk):
    found = made("drop")
    whole = found.routed(INPUTS)
    monkeypatch.setattr(partitions, "CHUNK", chunk)
    np.testing.assert_array_equal(found.routed(INPUTS), whole)
    assert found.routed(INPUTS[:0]).shape == (0,)


# A metric


def test_with_a_metric_every_token_goes_to_the_centre_nearest_after_it():
    root = np.random.default_rng(1).normal(size=(DIM, DIM)).astype(np.float32)
    found = made("rest", root=root)
    points = INPUTS @ root.T
    centres = [points[label == LABELS].mean(axis=0) for label in (0, 1, NOISE)]
    np.testing.assert_allclose(found.centres, centres, atol=1e-5)
    distances = np.linalg.norm(points[:, None] - np.stack(centres), axis=2)
    np.testing.assert_array_equal(found.routed(INPUTS), distances.argmin(axis=1))
    assert isinstance(found.router(), NearestRouter)
    again = found.router()(torch.from_numpy(INPUTS))[:, 0]
    np.testing.assert_array_equal(again, found.routed(INPUTS))


GRADED = replace(
    PLANTED,
    sample=replace(
        PLANTED.sample,
        directions=np.random.default_rng(2).normal(size=(2, 90, DIM)).astype(np.float16),
        norms=np.ones((2, 90), np.float32),
    ),
)
DRAW = draw_from(GRADED)


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_the_metric_of_the_inputs_is_that_of_the_outputs_up_to_its_scale(metric):
    found = metric_root(draw_from(GRADED, leading=10), best(metric=metric).resolved())
    of_outputs = torch.eye(DIM).double()
    if metric == "fisher":
        products = [np.outer(g, g) for g in GRADED.sample.gradients(ROWS[10:]).reshape(-1, DIM)]
        of_outputs = damped(torch.from_numpy(np.mean(products, axis=0)).double())
    plain = input_root(PLANTED.mlp, of_outputs).numpy()
    np.testing.assert_allclose(found, plain / plain.diagonal().mean(), rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float32


PROJECTED = replace(MEANS, reduce="pca", components=3)


def test_principal_components_are_those_of_the_inputs_in_the_metric():
    draw = draw_from(GRADED, np.arange(20, 40), leading=10)  # all but 10 tokens are drawn from
    whole = metric_root(draw, best().resolved())
    found = metric_root(draw, best(clustering=PROJECTED).resolved())
    assert found.shape == (3, DIM)
    oracle = PCA(3).fit((INPUTS @ whole.T)[10:]).components_ @ whole
    for component, expected in zip(found[::-1], oracle, strict=True):
        sign = np.sign(component @ expected)
        np.testing.assert_allclose(sign * component, expected, rtol=2e-3, atol=1e-4)


def test_more_components_than_there_are_inputs_are_all_of_them():
    many = replace(PROJECTED, components=DIM + 5)
    found = metric_root(DRAW, best(clustering=many).resolved())
    whole = metric_root(DRAW, best().resolved())
    np.testing.assert_allclose(found.T @ found, whole.T @ whole, rtol=1e-3, atol=1e-5)


def found_in(draw, config, root):
    """The partition by the clusters that are found with a store."""
    labels = clustered(draw, config, root=root)
    return partition(draw, trusted(labels, draw, config), config)


def test_how_many_clusters_and_components_suits_the_layer(tmp_path):
    free = replace(PROJECTED, count=None, components=None)
    fitting = free.for_width(SITE.hidden)
    left_open, filled = (best(clustering=c).resolved() for c in (free, fitting))
    root = metric_root(DRAW, left_open)
    np.testing.assert_array_equal(root, metric_root(DRAW, filled))
    found = found_in(DRAW, left_open, tmp_path / "open")
    again = found_in(DRAW, filled, tmp_path / "filled")
    np.testing.assert_array_equal(found.routed(INPUTS), again.routed(INPUTS))


@pytest.mark.parametrize("router", ["nearest", "cosine"])
def test_the_nearest_router_looks_where_the_clusters_were_found(tmp_path, router):
    config = best(clustering=PROJECTED, router=router).resolved()
    points = INPUTS @ metric_root(DRAW, config).T
    plain = KMeans(4, n_init=1, max_iter=25, random_state=config.seed).fit_predict(points)
    np.testing.assert_array_equal(clustered(DRAW, config, root=tmp_path), plain)
    found = found_in(DRAW, config, tmp_path)
    assert found.centres.shape == (4, DIM if router == "cosine" else 3)
    if router == "nearest":
        distances = np.linalg.norm(points[:, None] - found.centres, axis=2)
        np.testing.assert_array_equal(found.routed(INPUTS), distances.argmin(axis=1))


def test_a_metric_of_nothing_is_no_division_by_zero():
    unread = replace(GRADED, sample=replace(GRADED.sample, norms=np.zeros((2, 90), np.float32)))
    assert not metric_root(draw_from(unread), best().resolved()).any()


# Clusters in the store


def test_means_are_those_of_the_inputs_in_the_metric(tmp_path):
    config = best(seed=3).resolved()
    draw = draw_from(GRADED, np.arange(7, 90, 2))
    points = draw.inputs @ metric_root(draw, config).T
    plain = KMeans(4, n_init=1, max_iter=25, random_state=3).fit_predict(points)
    np.testing.assert_array_equal(clustered(draw, config, root=tmp_path), plain)


def test_where_activations_are_clustered_inputs_and_metric_do_not_matter(tmp_path):
    config = quick(clustering=replace(MEANS, space="hidden")).resolved()
    plain = KMeans(4, n_init=1, max_iter=25, random_state=0).fit_predict(DRAW.hidden)
    nowhere = replace(DRAW, inputs=0 * DRAW.inputs, fisher=None)
    np.testing.assert_array_equal(clustered(nowhere, config, root=tmp_path), plain)


@pytest.mark.parametrize("config", [best(), quick(clustering=CLUSTERING)])
def test_clusters_are_found_again_in_the_store(tmp_path, monkeypatch, config):
    config = config.resolved()
    first = clustered(DRAW, config, root=tmp_path)
    assert len(first) == 90
    for name in ("labels_of", "reduce_dimensions"):
        monkeypatch.setattr(partitions, name, lambda *_, **__: pytest.fail("again"))
    np.testing.assert_array_equal(clustered(DRAW, config, root=tmp_path), first)


@pytest.mark.parametrize("other", [{"seed": 1}, {"tokens": "alike"}, {"metric": "outputs"}])
def test_what_decides_the_clusters_decides_where_they_are_kept(tmp_path, other):
    clustered(DRAW, best().resolved(), root=tmp_path)
    clustered(DRAW, best(**other).resolved(), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "other",
    [
        draw_from(GRADED, ROWS[:50]),
        replace(DRAW, key="another sample"),
        replace(DRAW, site=replace(SITE, name="another layer")),
    ],
)
def test_what_is_drawn_decides_where_the_clusters_are_kept(tmp_path, other):
    clustered(DRAW, best().resolved(), root=tmp_path)
    clustered(other, best().resolved(), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_layer_without_clusters_keeps_its_reason():
    found = partition(draw_from(PLANTED), Clusters(LABELS, "1 clusters found"), quick().resolved())
    assert found.reason == "1 clusters found"
    assert found.noise_share == pytest.approx(30 / 90)
    assert found.centres is None


@pytest.mark.parametrize(
    ("labels", "reason"), [(LABELS, ""), (0 * LABELS, "1 clusters"), (LABELS - 1, "1 clusters")]
)
def test_clusters_are_trusted_by_the_rules_of_the_configuration(labels, reason):
    clusters = trusted(np.maximum(labels, NOISE), draw_from(PLANTED), quick().resolved())
    assert clusters.reason.startswith(reason)
    assert bool(clusters.reason) == bool(reason)
    np.testing.assert_array_equal(clusters.labels, np.maximum(labels, NOISE))


def test_too_much_noise_is_not_trusted():
    strict = quick(clustering=replace(CLUSTERING, max_noise=0.3)).resolved()
    assert "33% noise" in trusted(LABELS, draw_from(PLANTED), strict).reason


def test_random_centres_are_the_inputs_of_so_many_tokens(tmp_path):
    settings = ClusterConfig(method="random", reduce="none", count=5, min_samples=3)
    config = quick(clustering=settings).resolved()
    found = alive(found_in(draw_from(PLANTED), config, tmp_path), PLANTED)
    assert 2 <= found.experts <= 5
    assert all((np.abs(INPUTS - centre).max(axis=1) < 1e-6).any() for centre in found.centres)
    assert sum(counted(found)) == 90
