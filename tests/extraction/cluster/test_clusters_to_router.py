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
    by_expert,
    cluster_tokens,
    metric_root,
    partition_tokens,
)
from moee_analysis.extraction.record.fisher import damp, input_root
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter
from tests.helpers import layers
from tests.helpers.layers import DIM, LABELS, PLANTED, ROWS, SITE
from tests.helpers.runs import CLUSTERING, MEANS, best, quick

INPUTS = PLANTED.sample.inputs.astype(np.float32)
GRADED = {
    "directions": np.random.default_rng(2).normal(size=(90, 2, DIM)).astype(np.float16),
    "norms": np.ones((90, 2), np.float32),
}
GRADED = replace(PLANTED, sample=replace(PLANTED.sample, **GRADED))
DRAW = layers.draw_from(GRADED)
PROJECTED = replace(MEANS, reduce="pca", components=3)


def made(noise, *, labels=LABELS, rows=ROWS, leading=0):
    config = quick(noise=noise).resolved()
    return partition_tokens(layers.draw_from(PLANTED, rows, leading=leading), labels, config)


def routed(found):
    """Tokens that each expert gets."""
    return np.bincount(found.route(PLANTED.sample.inputs), minlength=found.experts).tolist()


def counted(found, *, leading=0):
    """Tokens that each expert's statistics count, leading ones aside."""
    _, members = Assignment((0,) * leading, found).of(PLANTED)
    own = members[(members != NOISE) & (PLANTED.sample.position >= leading)]
    return np.bincount(own - bool(leading), minlength=found.experts).tolist()


# From clusters to experts


@pytest.mark.parametrize(("noise", "counts", "sent"), [
    ("reroute", [70, 20], [70, 20]), ("drop", [40, 20], [70, 20]),
    ("rest", [40, 20, 30], None),  # an expert of its own
])  # fmt: skip
def test_experts_start_at_the_mean_inputs_and_noise_counts_as_the_configuration_says(
    noise, counts, sent
):
    found = made(noise)
    assert counted(found) == counts
    assert sent is None or routed(found) == sent
    assert (found.experts, found.reason, found.noise_share) == (len(counts), "", 1 / 3)
    assert isinstance(found.router(), CosineRouter)
    means = [INPUTS[rows].mean(axis=0) for rows in np.split(ROWS, [40, 60])]
    np.testing.assert_allclose(found.centres, means[: len(counts)], atol=1e-6)
    if noise == "rest":
        assert made("rest", labels=np.repeat([0, 1], [40, 50])).experts == 2  # without noise


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


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_tokens_are_routed_in_chunks_and_none_are_routed_at_all(monkeypatch, chunk):
    found = made("drop")
    whole = found.route(INPUTS)
    monkeypatch.setattr(clusters_to_router, "CHUNK", chunk)
    np.testing.assert_array_equal(found.route(INPUTS), whole)
    assert found.route(INPUTS[:0]).shape == (0,)


@pytest.mark.parametrize(("labels", "reason"), [
    (LABELS, ""), (0 * LABELS, "1 clusters found"), (np.maximum(LABELS - 1, NOISE), "1 clusters"),
])  # fmt: skip
def test_clusters_are_trusted_by_the_rules_of_the_configuration(labels, reason):
    found = made("reroute", labels=labels)
    assert found.reason.startswith(reason)
    assert bool(found.reason) == bool(reason) == (found.centres is None)
    assert found.noise_share == np.mean(labels == NOISE)


# A metric


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_the_metric_of_the_inputs_is_that_of_the_outputs_up_to_its_scale(metric):
    found = metric_root(layers.draw_from(GRADED, leading=10), best(metric=metric).resolved())
    of_outputs = torch.eye(DIM).double()
    if metric == "fisher":
        products = [np.outer(g, g) for g in GRADED.sample.gradients(ROWS[10:]).reshape(-1, DIM)]
        of_outputs = damp(torch.from_numpy(np.mean(products, axis=0)).double())
    plain = input_root(PLANTED.mlp, of_outputs).numpy()
    np.testing.assert_allclose(found, plain / plain.diagonal().mean(), rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float32


def test_principal_components_are_those_of_the_inputs_in_the_metric():
    draw = layers.draw_from(GRADED, np.arange(20, 40), leading=10)  # of all but 10 tokens
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
@pytest.mark.parametrize(("clustering", "count", "rank"), [
    (MEANS, 4, DIM), (PROJECTED, 4, 3), (replace(PROJECTED, count=None, components=None), 2, 2),
])  # fmt: skip
def test_the_nearest_router_looks_where_the_clusters_were_found(
    tmp_path, router, clustering, count, rank
):
    config = best(clustering=clustering, router=router, seed=3).resolved()
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
    assert not metric_root(layers.draw_from(unread), best().resolved()).any()


# Clusters in the store


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


@pytest.mark.parametrize(("draw", "settings"), [
    (DRAW, {"seed": 1}), (DRAW, {"tokens": "alike"}), (DRAW, {"metric": "outputs"}),
    (layers.draw_from(GRADED, ROWS[:50]), {}), (replace(DRAW, key="another sample"), {}),
    (replace(DRAW, site=replace(SITE, name="another layer")), {}),
])  # fmt: skip
def test_all_that_decides_the_clusters_decides_where_they_are_kept(tmp_path, draw, settings):
    cluster_tokens(DRAW, best().resolved(), root=tmp_path)
    cluster_tokens(draw, best(**settings).resolved(), root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# Assignments


IMAGES, TOKENS = 6, 5
COUNT = IMAGES * TOKENS
CENTRES = np.random.default_rng(1).normal(size=(3, DIM)).astype("f4")
ROUTED = Partition(centres=CENTRES)


POSITION = np.arange(COUNT, dtype=np.int32) % TOKENS
X = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype("f2")
LAYER = layers.layer_of(layers.sample_of(np.zeros((COUNT, 6), "f2"), inputs=X, position=POSITION))
# Expert of every token by the cosine to its centre, one after the other.
UNIT = CENTRES / np.linalg.norm(CENTRES, axis=1, keepdims=True)
NEAREST = np.array([np.argmax(UNIT @ x) for x in X.astype("f4")])


# Which expert a token goes to


@pytest.mark.parametrize(("prefix", "leading"), [
    ((), 0), ((0,), 1), ((0, 1), 2), ((0, 1, 1), 2),
])  # fmt: skip
def test_leading_tokens_have_the_experts_before_those_of_the_others(prefix, leading):
    assignment = Assignment(prefix, ROUTED)
    assert (assignment.leading, assignment.experts) == (leading, leading + 3)
    assert assignment.kinds.tolist() == [0] * leading + [1, 1, 1]
    for found in assignment.of(LAYER):
        assert found.dtype == np.int64
        for row, position in enumerate(POSITION):
            own = position < len(prefix)
            expected = prefix[position] if own else leading + NEAREST[row]
            assert found[row] == expected


def test_a_partition_of_one_expert_takes_all_others_and_needs_no_router():
    assert Partition().experts == 1
    assert isinstance(Partition().router(), ConstantRouter)
    assert Partition().route(X[:7]).tolist() == 7 * [0]
    routed, members = Assignment((0,), Partition()).of(LAYER)
    np.testing.assert_array_equal(routed, POSITION > 0)
    np.testing.assert_array_equal(members, routed)
    for partition in (ROUTED, Partition()):  # of leading tokens alone there is nothing to route
        found = Assignment((0,), partition).of(layers.part_of(LAYER, 5, 6))
        assert [experts.tolist() for experts in found] == [[0], [0]]


# Which one a token counts for


def labelled():
    """Every third token counts for an expert of its own choice, or for none."""
    rows = np.arange(1, COUNT, 3)
    return Partition(centres=CENTRES, rows=rows, labels=np.arange(len(rows)) % 4 - 1)


@pytest.mark.parametrize("prefix", [(), (0,), (0, 1)])
@pytest.mark.parametrize("cuts", [(), (7,), (1, 2, 11, 29), range(1, COUNT)])
def test_members_are_known_by_the_number_of_their_row_also_in_parts(prefix, cuts):
    partition, leading = labelled(), len(set(prefix))
    own = dict(zip(partition.rows.tolist(), partition.labels.tolist(), strict=True))
    routed, members = [], []
    for part in layers.parts_of(LAYER, cuts):
        found = Assignment(prefix, partition).of(part)
        routed.extend(found[0])
        members.extend(found[1])
    for row, position in enumerate(POSITION):
        if position < len(prefix):
            assert members[row] == routed[row] == prefix[position]
        else:
            label = own.get(row, NOISE)
            assert members[row] == (NOISE if label == NOISE else leading + label)
            assert routed[row] == leading + NEAREST[row]


# Experts that get nothing


def test_experts_of_the_partition_that_get_no_token_are_left_out():
    assignment = Assignment((0,), replace(labelled(), route_agreement=0.8))
    alive = assignment.alive(np.array([0, 5, 0, 2]))
    assert alive.prefix == (0,)
    assert (alive.experts, alive.partition.route_agreement) == (3, 0.8)
    np.testing.assert_array_equal(alive.partition.centres, CENTRES[[0, 2]])
    np.testing.assert_array_equal(alive.partition.rows, labelled().rows)
    number = {0: 0, 1: NOISE, 2: 1, NOISE: NOISE}
    assert alive.partition.labels.tolist() == [number[label] for label in labelled().labels]
    assert assignment.alive(np.array([0, 1, 2, 3])).partition is assignment.partition


@pytest.mark.parametrize("routed", [[3, 4, 0, 0], [3, 0, 0, 0]])
def test_a_single_expert_that_is_left_is_no_partition(routed):
    partition = Partition(0.25, centres=CENTRES)
    left = Assignment((0,), partition).alive(np.array(routed)).partition
    assert left.reason == "all tokens route to one expert"
    assert (left.noise_share, left.centres) == (0.25, None)
    assert Assignment((0,), Partition()).alive(np.array([4, 0])).experts == 2  # stays if alone


# What tells assignments apart


def test_a_digest_is_that_of_all_that_decides_who_gets_what():
    plain = labelled()
    others = [
        {"rows": None, "labels": None}, {"rows": plain.rows + 1}, {"labels": plain.labels[::-1]},
        {"rows": None, "labels": None, "root": np.eye(DIM, dtype="f4")},
    ]  # fmt: skip
    partitions = [plain, Partition(), *(replace(plain, **other) for other in others)]
    digests = [Assignment((), each).digest for each in partitions]
    assert len({*digests, Assignment((0,), plain).digest}) == 7
    same = Partition(0.5, centres=CENTRES, route_agreement=0.25)
    assert Assignment((), labelled()).digest == digests[0]
    assert Assignment((), same).digest == digests[2]


def test_rows_by_expert_are_ascending_and_those_of_none_are_left_out():
    experts = np.array([2, -1, 0, 2, 0, -1, 2])
    assert [rows.tolist() for rows in by_expert(experts, 4)] == [[2, 4], [], [0, 3, 6], []]
    assert [len(rows) for rows in by_expert(np.zeros(0, dtype=int), 2)] == [0, 0]
