from __future__ import annotations

import inspect

import numpy as np
import pytest
from hdbscan import _hdbscan_linkage, hdbscan_

from moee_analysis.extraction.cluster import exact_hdbscan as density
from moee_analysis.extraction.cluster.exact_hdbscan import (
    Backend,
    choose_backend,
    density_clusters,
    labels_of_tree,
)
from moee_analysis.extraction.cluster.spanning_tree import spanning_tree
from tests.helpers.partitions import same_partition

SIZES = {"min_cluster_size": 12, "max_cluster_size": 50}


@pytest.fixture(scope="module")
def points():
    """Two wide groups, one of them of two narrower ones, without ties of any kind."""
    rng = np.random.default_rng(3)
    centres = np.array([[0.0, 0, 0], [3, 0, 0], [20, 0, 0]])
    return centres[rng.integers(0, 3, size=180)] + rng.normal(size=(180, 3))


def test_hdbscan_s_private_functions_are_as_they_were():
    known = list(inspect.signature(hdbscan_._tree_to_labels).parameters)
    assert known[:4] == [
        "X", "single_linkage_tree", "min_cluster_size", "cluster_selection_method",
    ]  # fmt: skip
    assert "max_cluster_size" in known
    assert density._trouble() == "", "adapt labels_of_tree to the installed hdbscan"


@pytest.mark.parametrize("count", [500, 20_000, 1_000_000])
@pytest.mark.parametrize("dim", [5, 8, 768])
def test_products_find_the_tree_and_say_why(count, dim):
    found = choose_backend(count, dim)
    assert found.name == "products"
    assert f"{count} points of {dim} dimensions" in found.reason


def test_hdbscan_finds_the_tree_of_very_many_points_in_a_plane():
    assert choose_backend(20_000, 2).name == "products"
    found = choose_backend(20_001, 4)
    assert found.name == "hdbscan"
    assert "only 4 dimensions" in found.reason


@pytest.mark.parametrize(
    "changed",
    [
        lambda _points, hierarchy, *, smallest: pytest.fail("not as it was"),
        lambda *_, **_settings: (np.zeros(6, int),),
        lambda *_, **_settings: (np.arange(3),),
    ],
)
def test_another_choice_of_clusters_is_noticed(monkeypatch, changed):
    monkeypatch.setattr(hdbscan_, "_tree_to_labels", changed)
    found = choose_backend(100, 8)
    assert found.name == "hdbscan"
    assert "functions of the installed hdbscan have changed" in found.reason


@pytest.mark.parametrize("changed", [None, lambda edges, _weights: edges])
def test_without_its_private_functions_hdbscan_finds_the_tree_itself(points, monkeypatch, changed):
    expected = density_clusters(points, min_samples=1, **SIZES)
    if changed:
        monkeypatch.setattr(_hdbscan_linkage, "label", changed)
    else:
        monkeypatch.delattr(_hdbscan_linkage, "label")
    assert choose_backend(*points.shape).name == "hdbscan"
    monkeypatch.setattr(density, "spanning_tree", lambda *_: pytest.fail("no use for it"))
    assert same_partition(density_clusters(points, min_samples=1, **SIZES), expected)


@pytest.mark.parametrize("selection", ["eom", "leaf"])
@pytest.mark.parametrize("most", [None, 50, 100])
def test_both_backends_find_the_same_clusters(points, monkeypatch, selection, most):
    settings = {"min_samples": 1, "min_cluster_size": 8, "max_cluster_size": most}
    labels = []
    for name in ("products", "hdbscan"):
        backend = Backend(name, "for the test")
        monkeypatch.setattr(density, "choose_backend", lambda *_, b=backend: b)
        labels.append(density_clusters(points, selection=selection, **settings))
    assert same_partition(*labels)


def test_one_tree_serves_for_many_settings(points):
    tree = spanning_tree(points, 5)
    counts = [labels_of_tree(tree, min_cluster_size=size).max() + 1 for size in (5, 20, 100)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    direct = density_clusters(points, min_samples=5, min_cluster_size=20)
    np.testing.assert_array_equal(direct, labels_of_tree(tree, min_cluster_size=20))


def test_clusters_larger_than_all_points_are_noise(points):
    assert set(density_clusters(points, min_samples=3, min_cluster_size=1000)) == {-1}
