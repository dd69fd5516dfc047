from __future__ import annotations

import itertools

import numpy as np
import pytest

from moee_analysis.baselines.common import graph_partition
from moee_analysis.baselines.common.graph_partition import (
    METHODS,
    best_method,
    cut,
    levelled,
    partition,
)
from moee_analysis.errors import MoeeError


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
    sizes = np.bincount(partition(random_graph(nodes, seed=1), parts, method=method))
    assert len(sizes) == parts
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("nodes", "parts"), [(8, 2), (9, 3), (10, 2), (8, 4), (10, 5)])
def test_the_cut_is_close_to_the_least_of_all_divisions(nodes, parts):
    graphs = [random_graph(nodes, seed=seed) for seed in range(12)]
    found = [cut(w, partition(w, parts, method="spectral")) for w in graphs]
    least = [least_cut(w, parts) for w in graphs]
    assert all(one >= other for one, other in zip(found, least, strict=True))
    assert sum(found) <= 1.02 * sum(least)


@pytest.mark.parametrize(("parts", "size"), [(4, 8), (12, 4)])
def test_planted_blocks_are_found(parts, size, method):
    weights, truth = planted(parts, size)
    part_of = partition(weights, parts, method=method)
    assert all(len(set(truth[part_of == part])) == 1 for part in range(parts))


def test_the_cut_counts_every_edge_between_parts_once():
    weights = random_graph(9, seed=3)
    part_of = np.random.default_rng(0).integers(0, 3, size=9)
    pairs = itertools.combinations(range(9), 2)
    assert cut(weights, part_of) == sum(weights[a, b] for a, b in pairs if part_of[a] != part_of[b])


def test_the_diagonal_means_nothing(method):
    weights = random_graph(20, seed=4)
    loops = weights + np.diag(np.arange(20) * 1000)
    one, other = (partition(w, 4, method=method) for w in (weights, loops))
    np.testing.assert_array_equal(one, other)


def test_the_seed_decides(method):
    weights = random_graph(40, seed=5)
    found = [partition(weights, 8, method=method, seed=seed) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert any((found[0] != other).any() for other in found[2:])


def test_graphs_without_edges_and_lonely_nodes_are_dealt_out(method):
    assert list(np.bincount(partition(np.zeros((12, 12), np.int64), 3, method=method))) == [4] * 3
    weights, _ = planted(3, 4)
    weights[:2] = weights[:, :2] = 0
    assert list(np.bincount(partition(weights, 3, method=method))) == [4] * 3


def test_heavy_graphs_are_divided_as_light_ones(method):
    weights, truth = planted(4, 8)
    part_of = partition(weights * 2**40, 4, method=method)
    assert all(len(set(truth[part_of == part])) == 1 for part in range(4))


def test_nodes_leave_only_parts_that_are_too_large():
    part_of = np.array([0] * 7 + [1] * 3 + [2])
    level = levelled(part_of, 3)
    assert sorted(np.bincount(level)) == [3, 4, 4]
    assert (level[7:] == part_of[7:]).all()
    assert (level[:7] == 0).sum() == 4


def test_metis_is_preferred_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(graph_partition, "find_spec", lambda _: None)
    assert best_method() == "spectral"
    with pytest.raises(MoeeError, match="pip install pymetis"):
        partition(random_graph(8, seed=0), 2, method="metis")
    monkeypatch.setattr(graph_partition, "find_spec", lambda _: "found")
    assert best_method() == "metis"


@pytest.mark.parametrize(("parts", "method", "message"), [
    (9, "spectral", "1 to 8 parts"),
    (0, "spectral", "1 to 8 parts"),
    (2, "louvain", "metis, spectral"),
])  # fmt: skip
def test_impossible_requests_are_refused(parts, method, message):
    with pytest.raises(MoeeError, match=message):
        partition(random_graph(8, seed=0), parts, method=method)
