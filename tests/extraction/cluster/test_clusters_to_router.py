from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from moee_analysis.extraction.cluster import clusters_to_router
from moee_analysis.extraction.cluster.clustering import NOISE
from moee_analysis.extraction.cluster.clusters_to_router import (
    Assignment,
    Partition,
    cluster_tokens,
    metric_root,
    partition_tokens,
)
from moee_analysis.extraction.record.fisher import damped, input_root
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter
from tests.helpers.layers import DIM, EAST, LABELS, NORTH, PLANTED, ROWS, SITE, draw_from, planted
from tests.helpers.runs import CLUSTERING, MEANS, best, quick

INPUTS = PLANTED.sample.inputs.astype(np.float32)


def made(noise, *, layer=PLANTED, labels=LABELS, rows=ROWS, leading=0):
    config = quick(noise=noise).resolved()
    return partition_tokens(draw_from(layer, rows, leading=leading), labels, config)


def routed(found, layer=PLANTED):
    """Tokens that each expert gets."""
    return np.bincount(found.route(layer.sample.inputs), minlength=found.experts).tolist()


def counted(found, layer=PLANTED, *, leading=0):
    """Tokens that each expert's statistics count, leading ones aside."""
    _, members = Assignment((0,) * leading, found).of(layer)
    own = members[(members != NOISE) & (layer.sample.position >= leading)]
    return np.bincount(own - bool(leading), minlength=found.experts).tolist()


def alive(found, layer):
    """The same without experts that get no tokens."""
    return Assignment((), found).alive(np.array(routed(found, layer))).partition


# From clusters to experts


def test_experts_start_at_the_mean_inputs_of_their_clusters():
    found = made("drop")
    means = [INPUTS[:40].mean(axis=0), INPUTS[40:60].mean(axis=0)]
    np.testing.assert_allclose(found.centres, means, atol=1e-6)
    assert isinstance(found.router(), CosineRouter)
    assert found.noise_share == pytest.approx(30 / 90)
    assert (found.experts, found.reason) == (2, "")


@pytest.mark.parametrize(
    ("noise", "counts", "sent"),
    [
        ("reroute", [70, 20], [70, 20]),
        ("drop", [40, 20], [70, 20]),
        ("rest", [40, 20, 30], None),  # an expert of its own
    ],
)
def test_noise_counts_as_the_configuration_says(noise, counts, sent):
    found = made(noise)
    assert counted(found) == counts
    assert sent is None or routed(found) == sent
    if noise == "rest":
        np.testing.assert_allclose(found.centres[2], INPUTS[60:].mean(axis=0), atol=1e-6)
        assert made("rest", labels=np.repeat([0, 1], [40, 50])).experts == 2  # without noise


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


def test_only_some_rows_need_to_be_clustered_and_leading_ones_are_not():
    rows = np.arange(0, 90, 2)
    assert sum(counted(made("reroute", labels=LABELS[rows], rows=rows))) == 90
    assert counted(made("drop", labels=LABELS[rows], rows=rows)) == [20, 10]
    rows = np.arange(5, 90)[::2]
    for noise, counts in (("reroute", [65, 20]), ("drop", [18, 10])):
        found = made(noise, labels=LABELS[rows], rows=rows, leading=5)
        assert counted(found, leading=5) == counts
        assert np.bincount(found.route(INPUTS[5:])).tolist() == [65, 20]


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
    assert found.route(INPUTS[:7]).tolist() == 7 * [0]
    assert found.members(np.zeros(7, dtype=int), np.arange(7)).tolist() == 7 * [0]
    assert found.experts == 1
    assert isinstance(found.router(), ConstantRouter)


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_tokens_are_routed_in_chunks_and_none_are_routed_at_all(monkeypatch, chunk):
    found = made("drop")
    whole = found.route(INPUTS)
    monkeypatch.setattr(clusters_to_router, "CHUNK", chunk)
    np.testing.assert_array_equal(found.route(INPUTS), whole)
    assert found.route(INPUTS[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(LABELS, ""), (0 * LABELS, "1 clusters found"), (np.maximum(LABELS - 1, NOISE), "1 clusters")],
)
def test_clusters_are_trusted_by_the_rules_of_the_configuration(labels, reason):
    found = made("reroute", labels=labels)
    assert found.reason.startswith(reason)
    assert bool(found.reason) == bool(reason) == (found.centres is None)
    assert found.noise_share == np.mean(labels == NOISE)


# A metric


GRADED = replace(
    PLANTED,
    sample=replace(
        PLANTED.sample,
        directions=np.random.default_rng(2).normal(size=(90, 2, DIM)).astype(np.float16),
        norms=np.ones((90, 2), np.float32),
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


@pytest.mark.parametrize("router", ["nearest", "cosine"])
@pytest.mark.parametrize("left_open", [False, True])
def test_the_nearest_router_looks_where_the_clusters_were_found(tmp_path, router, left_open):
    clustering = replace(PROJECTED, count=None, components=None) if left_open else PROJECTED
    config = best(clustering=clustering, router=router).resolved()
    count, rank = (2, 2) if left_open else (4, 3)
    points = INPUTS @ metric_root(DRAW, config).T
    plain = KMeans(count, n_init=1, max_iter=25, random_state=config.seed).fit_predict(points)
    labels = cluster_tokens(DRAW, config, root=tmp_path)
    np.testing.assert_array_equal(labels, plain)
    found = partition_tokens(DRAW, labels, config)
    assert found.centres.shape == (count, DIM if router == "cosine" else rank)
    if router == "nearest":
        means = [points[labels == label].mean(axis=0) for label in range(count)]
        np.testing.assert_allclose(found.centres, means, atol=1e-5)
        distances = np.linalg.norm(points[:, None] - found.centres, axis=2)
        np.testing.assert_array_equal(found.route(INPUTS), distances.argmin(axis=1))
        assert isinstance(found.router(), NearestRouter)
        again = found.router()(torch.from_numpy(INPUTS))[:, 0]
        np.testing.assert_array_equal(again, found.route(INPUTS))


def test_a_metric_of_nothing_is_no_division_by_zero():
    unread = replace(GRADED, sample=replace(GRADED.sample, norms=np.zeros((90, 2), np.float32)))
    assert not metric_root(draw_from(unread), best().resolved()).any()


# Clusters in the store


def test_means_are_those_of_the_inputs_in_the_metric(tmp_path):
    config = best(seed=3).resolved()
    draw = draw_from(GRADED, np.arange(7, 90, 2))
    points = draw.inputs @ metric_root(draw, config).T
    plain = KMeans(4, n_init=1, max_iter=25, random_state=3).fit_predict(points)
    np.testing.assert_array_equal(cluster_tokens(draw, config, root=tmp_path), plain)


def test_where_activations_are_clustered_inputs_and_metric_do_not_matter(tmp_path):
    config = quick(clustering=replace(MEANS, space="hidden")).resolved()
    plain = KMeans(4, n_init=1, max_iter=25, random_state=0).fit_predict(DRAW.hidden)
    nowhere = replace(DRAW, inputs=0 * DRAW.inputs, fisher=None)
    np.testing.assert_array_equal(cluster_tokens(nowhere, config, root=tmp_path), plain)


@pytest.mark.parametrize("config", [best(), quick(clustering=CLUSTERING)])
def test_clusters_are_found_again_in_the_store(tmp_path, monkeypatch, config):
    config = config.resolved()
    first = cluster_tokens(DRAW, config, root=tmp_path)
    assert len(first) == 90
    for name in ("label", "reduce_dimensions"):
        monkeypatch.setattr(clusters_to_router, name, lambda *_, **__: pytest.fail("again"))
    np.testing.assert_array_equal(cluster_tokens(DRAW, config, root=tmp_path), first)


@pytest.mark.parametrize(
    ("draw", "settings"),
    [
        (DRAW, {"seed": 1}),
        (DRAW, {"tokens": "alike"}),
        (DRAW, {"metric": "outputs"}),
        (draw_from(GRADED, ROWS[:50]), {}),
        (replace(DRAW, key="another sample"), {}),
        (replace(DRAW, site=replace(SITE, name="another layer")), {}),
    ],
)
def test_all_that_decides_the_clusters_decides_where_they_are_kept(tmp_path, draw, settings):
    cluster_tokens(DRAW, best().resolved(), root=tmp_path)
    cluster_tokens(draw, best(**settings).resolved(), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
