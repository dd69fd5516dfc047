from __future__ import annotations

import itertools

import numpy as np
import pytest

from moee_analysis.baselines.common import equal_parts
from moee_analysis.baselines.common.equal_parts import (
    METHODS,
    balanced_kmeans,
    best_method,
    cluster_means,
    divide_graph,
    level_parts,
)
from moee_analysis.errors import MoeeError

# Points


def inertia(points, labels, clusters):
    return ((points - cluster_means(points, labels, clusters)[labels]) ** 2).sum()


@pytest.mark.parametrize(("count", "clusters"), [(24, 4), (25, 4), (7, 7), (9, 1)])
def test_sizes_of_clusters_differ_by_one_at_most(count, clusters):
    points = np.random.default_rng(count).normal(size=(count, 3))
    sizes = np.bincount(balanced_kmeans(points, clusters), minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    assert list(np.bincount(balanced_kmeans(np.ones((12, 2)), 3))) == [4, 4, 4]  # equal points


def test_separate_groups_are_found():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 10)
    points = 20 * np.eye(4)[truth] + rng.normal(size=(40, 4))
    labels = balanced_kmeans(points, 4)
    assert all(len(set(labels[truth == group])) == 1 for group in range(4))


def test_close_to_the_best_of_all_divisions():
    points = np.random.default_rng(2).normal(size=(8, 2))
    halves = (np.isin(np.arange(8), half) for half in itertools.combinations(range(8), 4))
    best = min(inertia(points, half.astype(int), 2) for half in halves)
    found = min(inertia(points, balanced_kmeans(points, 2, seed=s), 2) for s in range(5))
    assert found == pytest.approx(best)


def test_more_rounds_are_never_worse():
    points = np.random.default_rng(1).normal(size=(60, 5))
    spread = [inertia(points, balanced_kmeans(points, 6, rounds=r), 6) for r in (1, 2, 5, 20)]
    assert spread == sorted(spread, reverse=True)


def test_the_seed_of_k_means_decides():
    points = np.random.default_rng(1).normal(size=(60, 5))
    np.testing.assert_array_equal(balanced_kmeans(points, 6), balanced_kmeans(points, 6))
    assert (balanced_kmeans(points, 6) != balanced_kmeans(points, 6, seed=1)).any()


# Graphs


def cut(weights, part_of):
    """Sum of the weights of all edges between different parts."""
    return weights[part_of[:, None] != part_of].sum() / 2


def random_graph(nodes, *, seed):
    weights = np.random.default_rng(seed).integers(0, 50, size=(nodes, nodes))
    return np.triu(weights, 1) + np.triu(weights, 1).T


def planted(parts, size, *, seed=0):
    """Blocks of heavy edges among light ones, in random order; and the block of each node."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(parts), size))
    weights = random_graph(parts * size, seed=seed) + 100 * (truth[:, None] == truth)
    return weights - np.diag(np.diag(weights)), truth


def divisions(nodes, size):
    """All divisions of ``nodes`` into parts of ``size``, as lists of the parts."""
    if not nodes:
        yield []
        return
    first, *others = nodes
    for rest in itertools.combinations(others, size - 1):
        left = [node for node in others if node not in rest]
        for further in divisions(left, size):
            yield [(first, *rest), *further]


def least_cut(weights, parts):
    nodes, best = len(weights), np.inf
    for division in divisions(list(range(nodes)), nodes // parts):
        within = sum(weights[a, b] for part in division for a, b in itertools.combinations(part, 2))
        best = min(best, weights.sum() / 2 - within)
    return best


@pytest.fixture(params=METHODS)
def method(request):
    if request.param == "metis":
        pytest.importorskip("pymetis")
    return request.param


@pytest.mark.parametrize(("nodes", "parts"), [(24, 4), (25, 4), (7, 7), (9, 1), (30, 11)])
def test_sizes_differ_by_one_at_most(nodes, parts, method):
    sizes = np.bincount(divide_graph(random_graph(nodes, seed=1), parts, method=method))
    assert len(sizes) == parts
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("nodes", "parts"), [(8, 2), (9, 3), (10, 2), (8, 4), (10, 5)])
def test_the_cut_is_close_to_the_least_of_all_divisions(nodes, parts):
    graphs = [random_graph(nodes, seed=seed) for seed in range(12)]
    found = [cut(w, divide_graph(w, parts, method="spectral")) for w in graphs]
    least = [least_cut(w, parts) for w in graphs]
    assert all(one >= other for one, other in zip(found, least, strict=True))
    assert sum(found) <= 1.02 * sum(least)


@pytest.mark.parametrize("heavier", [1, 2**40])  # than METIS can count
@pytest.mark.parametrize(("parts", "size"), [(4, 8), (12, 4)])
def test_planted_blocks_are_found(parts, size, heavier, method):
    weights, truth = planted(parts, size)
    part_of = divide_graph(weights * heavier, parts, method=method)
    assert all(len(set(truth[part_of == part])) == 1 for part in range(parts))


def test_the_diagonal_means_nothing(method):
    weights = random_graph(20, seed=4)
    loops = weights + np.diag(np.arange(20) * 1000)
    one, other = (divide_graph(w, 4, method=method) for w in (weights, loops))
    np.testing.assert_array_equal(one, other)


def test_the_seed_decides(method):
    weights = random_graph(40, seed=5)
    found = [divide_graph(weights, 8, method=method, seed=seed) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert any((found[0] != other).any() for other in found[2:])


def test_graphs_without_edges_and_lonely_nodes_are_dealt_out(method):
    assert (
        list(np.bincount(divide_graph(np.zeros((12, 12), np.int64), 3, method=method))) == [4] * 3
    )
    weights, _ = planted(3, 4)
    weights[:2] = weights[:, :2] = 0
    assert list(np.bincount(divide_graph(weights, 3, method=method))) == [4] * 3


def test_nodes_leave_only_parts_that_are_too_large():
    part_of = np.array([0] * 7 + [1] * 3 + [2])
    level = level_parts(part_of, 3)
    assert sorted(np.bincount(level)) == [3, 4, 4]
    assert (level[7:] == part_of[7:]).all()
    assert (level[:7] == 0).sum() == 4


def test_metis_is_preferred_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: None)
    assert best_method() == "spectral"
    with pytest.raises(MoeeError, match="pip install pymetis"):
        divide_graph(random_graph(8, seed=0), 2, method="metis")
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: "found")
    assert best_method() == "metis"


@pytest.mark.parametrize(("parts", "method", "message"), [
    (9, "spectral", "1 to 8 parts"),
    (0, "spectral", "1 to 8 parts"),
    (2, "louvain", "metis, spectral"),
])  # fmt: skip
def test_impossible_requests_are_refused(parts, method, message):
    with pytest.raises(MoeeError, match=message):
        divide_graph(random_graph(8, seed=0), parts, method=method)
