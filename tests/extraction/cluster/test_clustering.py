from dataclasses import replace
from unittest.mock import Mock

import hdbscan
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster import clustering
from moee_analysis.extraction.cluster.clustering import (
    NOISE,
    Clusters,
    assess,
    cluster,
    label,
    nearest,
)
from moee_analysis.extraction.config import ClusterConfig
from tests.helpers.layers import same_partition
from tests.helpers.runs import CLUSTERING

RAW = ClusterConfig(reduce="none", min_samples=5, min_cluster_size=0.1, max_cluster_size=None)


@pytest.fixture(scope="module")
def blobs():
    """Three groups of 50 activations of 12 neurons, and 15 in no group."""
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(3, 12))
    groups = [centre + 0.3 * rng.normal(size=(50, 12)) for centre in centres]
    points = np.concatenate([*groups, 6 * rng.normal(size=(15, 12))])
    truth = np.repeat([0, 1, 2, NOISE], [50, 50, 50, 15])
    order = rng.permutation(len(points))
    return points[order].astype(np.float16), truth[order]


def same_groups(labels, truth):
    """Whether the clusters are the planted groups, up to their numbers and a few stragglers."""
    member = (labels != NOISE) & (truth != NOISE)
    pairs = set(zip(labels[member], truth[member], strict=True))
    return len(pairs) == len(set(labels[member])) == 3 and member.sum() >= 0.95 * 150


# HDBSCAN


@pytest.mark.parametrize("changed", [
    {}, {"max_cluster_size": 0.4}, {"min_samples": 1, "min_cluster_size": 0.02},
])  # fmt: skip
def test_without_reduction_the_clusters_are_those_of_plain_hdbscan(blobs, changed):
    config, points = replace(RAW, **changed), blobs[0]
    sizes = {
        "min_cluster_size": round(config.min_cluster_size * len(points)),
        "max_cluster_size": round((config.max_cluster_size or 0) * len(points)),
    }
    plain = hdbscan.HDBSCAN(min_samples=config.min_samples, **sizes)
    labels = plain.fit_predict(points.astype(np.float64))
    assert same_partition(cluster(points, config).labels, labels)


def test_the_order_of_the_tokens_does_not_matter(blobs):
    points = np.round(blobs[0])  # with ties
    order = np.random.default_rng(5).permutation(len(points))
    labels = cluster(points, RAW).labels
    np.testing.assert_array_equal(cluster(points[order], RAW).labels, labels[order])


def test_min_samples_and_sizes_are_never_left_to_hdbscan(blobs, monkeypatch):
    tree, labels = (Mock(wraps=f) for f in (clustering.spanning_tree, clustering.label_tree))
    monkeypatch.setattr(clustering, "spanning_tree", tree)
    monkeypatch.setattr(clustering, "label_tree", labels)
    cluster(blobs[0], ClusterConfig(reduce="none"))
    assert tree.call_args.args[1] == 10
    assert labels.call_args.kwargs == {"min_cluster_size": 2, "max_cluster_size": 41}


@pytest.mark.parametrize("reduce", ["none", "pca", "umap"])
def test_planted_groups_are_found_again_and_again(blobs, reduce):
    points, truth = blobs
    config = replace(RAW, reduce=reduce, components=2 if reduce == "umap" else 4, neighbors=10)
    found, again = (cluster(points, config, seed=3) for _ in range(2))
    assert same_groups(found.labels, truth)
    assert found.labels.tolist() == again.labels.tolist()
    assert (found.reason, found.noise_share) == ("", np.mean(found.labels == NOISE))
    if reduce != "umap":
        assert found.count == 3
        assert found.noise_share == pytest.approx(15 / 165, abs=0.05)


# Means, and centres at random


def test_means_are_those_of_plain_k_means(blobs):
    points = blobs[0].astype(np.float32)
    plain = KMeans(5, n_init=1, max_iter=25, random_state=2).fit_predict(points)
    found = cluster(points, replace(RAW, method="kmeans", count=5), seed=2)
    np.testing.assert_array_equal(found.labels, plain)
    assert (found.count, found.noise_share, found.reason) == (5, 0, "")


def test_there_are_no_more_means_than_different_tokens():
    config = replace(RAW, method="kmeans", count=8)
    assert set(label(np.repeat(np.eye(3, dtype="f4"), 10, axis=0), config)) == {0, 1, 2}
    assert cluster(np.ones((30, 4)), config).reason == "1 clusters found"


def test_random_centres_are_so_many_tokens_and_the_others_belong_to_none(blobs):
    config = replace(RAW, method="random", count=7, max_noise=0.1)
    labels = label(blobs[0], config, seed=1)
    assert sorted(labels[labels != NOISE]) == list(range(7))
    assert (labels == NOISE).sum() == len(labels) - 7
    np.testing.assert_array_equal(labels, label(blobs[0], config, seed=1))
    assert (labels != label(blobs[0], config, seed=2)).any()
    assert cluster(blobs[0], config).reason == ""  # what is no centre is no noise
    assert sorted(label(np.zeros((4, 2)), replace(config, count=9))) == [0, 1, 2, 3]


# What cannot make experts


@pytest.mark.parametrize("reduce", ["none", "pca", "umap"])
def test_a_dead_layer_has_no_clusters(reduce):
    found = cluster(np.zeros((40, 12), np.float16), replace(CLUSTERING, reduce=reduce))
    assert (found.reason, found.noise_share) == ("0 clusters found", 1)


def test_a_layer_of_one_cluster_or_of_too_much_noise_stays_dense_and_says_so():
    assert assess(np.zeros(9, int), RAW).reason == "1 clusters found"
    labels = np.array([0, 0, 1, 1] + 6 * [NOISE])
    assert assess(labels, replace(RAW, max_noise=0.6)) == Clusters(labels)
    reason = assess(labels, replace(RAW, max_noise=0.5)).reason
    assert reason == "60% noise, more than max_noise=50%"


@pytest.mark.parametrize(("points", "words"), [
    (np.where(np.eye(40, 12), np.nan, 1.0), "finite"),
    (np.where(np.eye(40, 12), np.inf, 1.0), "finite"), (np.zeros((11, 4)), "at least 12 tokens"),
])  # fmt: skip
def test_activations_that_are_not_numbers_or_too_few_are_refused(points, words):
    with pytest.raises(MoeeError, match=words):
        cluster(points, ClusterConfig())


@pytest.mark.parametrize("wrong", [
    {"reduce": "tsne"}, {"method": "guess"}, {"space": "outputs"}, {"count": 0}, {"count": 2.5},
    {"min_samples": 0}, {"min_samples": None}, {"components": 2.5}, {"neighbors": True},
    {"min_cluster_size": 50}, {"min_cluster_size": 0}, {"max_noise": 1.5},
    {"max_noise": float("nan")}, {"max_cluster_size": 0.005},
])  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(MoeeError, match=next(iter(wrong))):
        ClusterConfig(**wrong)


@pytest.mark.parametrize(
    ("hidden", "count", "components"), [(6, 2, 2), (256, 21, 5), (768, 64, 16), (3072, 64, 64)]
)
def test_settings_that_are_left_open_suit_the_width_of_the_layer(hidden, count, components):
    free = ClusterConfig(method="kmeans", count=None, components=None)
    assert free.for_width(hidden) == replace(free, count=count, components=components)
    assert replace(free, count=5).for_width(hidden).count == 5
    assert replace(free, components=5).for_width(hidden).components == 5


# Neighbours for UMAP


def test_neighbours_are_those_of_the_full_table_of_distances():
    points = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    points[[3, 4, 5]] = points[[7, 8, 9]]
    points[[10, 20]] = 0  # without direction: far from all but their like
    table = cdist(points.astype(np.float64), points, metric="cosine")
    table[[10, 20]] = table[:, [10, 20]] = 1
    table[[10, 10, 20, 20], [10, 20, 10, 20]] = 0
    ids, distances = nearest(points, 15)
    assert distances == pytest.approx(np.sort(table, axis=1)[:, :15], abs=1e-5)
    assert distances == pytest.approx(np.take_along_axis(table, ids, axis=1), abs=1e-5)
    assert ids[:, 0].tolist() == list(range(300))  # also beside a copy
    assert (ids[3, 1], ids[10, 1]) == (7, 20)
    assert all(len(set(row)) == 15 for row in ids)
