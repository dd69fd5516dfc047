import itertools

import numpy as np
import pytest
import torch

from moee_analysis.baselines.common import equal_parts
from moee_analysis.baselines.common.equal_parts import (
    balanced_kmeans,
    best_method,
    cluster_means,
    coactivation,
    divide_graph,
    graph_edges,
)


def inertia(points, labels, clusters):
    return ((points - cluster_means(points, labels, clusters)[labels]) ** 2).sum()


def alike(truth, labels):
    """Whether all of each true group have one label."""
    return all(len(set(labels[truth == group])) == 1 for group in np.unique(truth))


def check_sizes(labels, parts):
    sizes = np.bincount(labels)
    assert len(sizes) == parts
    assert sizes.max() - sizes.min() <= 1


def test_separate_groups_are_found_and_sizes_differ_by_one_at_most():
    rng, truth = np.random.default_rng(0), np.repeat(np.arange(4), 10)
    assert alike(truth, balanced_kmeans(20 * np.eye(4)[truth] + rng.normal(size=(40, 4)), 4))
    for count, clusters in ((25, 4), (7, 7), (9, 1)):
        check_sizes(balanced_kmeans(rng.normal(size=(count, 3)), clusters), clusters)
    check_sizes(balanced_kmeans(np.ones((12, 2)), 3), 3)  # equal points


def test_more_rounds_are_never_worse_and_the_seed_decides():
    points = np.random.default_rng(1).normal(size=(60, 5))
    spread = [inertia(points, balanced_kmeans(points, 6, rounds=r), 6) for r in (1, 2, 5, 20)]
    assert spread == sorted(spread, reverse=True)
    first, same, other = (balanced_kmeans(points, 6, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_close_to_the_best_of_all_divisions():
    points = np.random.default_rng(2).normal(size=(8, 2))
    halves = (np.isin(np.arange(8), half) for half in itertools.combinations(range(8), 4))
    best = min(inertia(points, half.astype(int), 2) for half in halves)
    found = min(inertia(points, balanced_kmeans(points, 2, seed=s), 2) for s in range(5))
    assert found == pytest.approx(best)


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


def least_cut(weights, size, left=None):
    """The least cut of all divisions of the nodes into parts of ``size``."""
    first, *others = left or range(len(weights))
    if len(others) < size:
        return 0
    cuts = []
    for rest in itertools.combinations(others, size - 1):
        outside = [node for node in others if node not in rest]
        own = weights[np.ix_([first, *rest], outside)].sum()
        cuts.append(own + least_cut(weights, size, outside))
    return min(cuts)


@pytest.fixture
def without_metis(monkeypatch):
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: None)


@pytest.fixture(params=["metis", "spectral"])
def _method(request):
    """Each method in its turn."""
    if request.param == "metis":
        pytest.importorskip("pymetis")
    else:
        request.getfixturevalue("without_metis")


by_every_method = pytest.mark.usefixtures("_method")


@by_every_method
@pytest.mark.parametrize(("nodes", "parts"), [(24, 4), (25, 4), (7, 7), (9, 1), (30, 11)])
def test_sizes_differ_by_one_at_most(nodes, parts):
    check_sizes(divide_graph(random_graph(nodes, seed=1), parts), parts)


@pytest.mark.usefixtures("without_metis")
@pytest.mark.parametrize(("nodes", "parts"), [(8, 2), (9, 3), (10, 2), (8, 4), (10, 5)])
def test_the_cut_is_close_to_the_least_of_all_divisions(nodes, parts):
    graphs = [random_graph(nodes, seed=seed) for seed in range(12)]
    found = [cut(w, divide_graph(w, parts)) for w in graphs]
    least = [least_cut(w, nodes // parts) for w in graphs]
    assert all(one >= other for one, other in zip(found, least, strict=True))
    assert sum(found) <= 1.02 * sum(least)


@by_every_method
@pytest.mark.parametrize("heavier", [1, 2**40])  # than METIS can count
@pytest.mark.parametrize(("parts", "size"), [(4, 8), (12, 4)])
def test_planted_blocks_are_found(parts, size, heavier):
    weights, truth = planted(parts, size)
    assert alike(truth, divide_graph(weights * heavier, parts))


@by_every_method
def test_the_seed_decides_and_the_diagonal_means_nothing():
    weights = random_graph(40, seed=5)
    loops = weights + np.diag(np.arange(40) * 1000)
    again = [divide_graph(weights, 8, seed=seed) for seed in (0, 0, 1, 2)]
    found = [divide_graph(loops, 8), *again]
    for other in found[1:3]:
        np.testing.assert_array_equal(found[0], other)
    assert any((found[0] != other).any() for other in found[3:])


@by_every_method
def test_graphs_without_edges_and_lonely_nodes_are_dealt_out():
    weights, _ = planted(3, 4)
    weights[:2] = weights[:, :2] = 0
    for each in (np.zeros((12, 12), np.int64), weights):
        check_sizes(divide_graph(each, 3), 3)


def test_metis_is_preferred_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: None)
    assert best_method() == "spectral"
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: "found")
    assert best_method() == "metis"


def activations(count=35):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [35, 32, 3])
def test_coactivation_is_what_the_definition_says_of_tokens_in_any_blocks(count):
    hidden, expected = activations(count), np.zeros((12, 12))
    fired = hidden.relu().numpy()
    for start in range(0, count, 8):
        for one, other in np.ndindex(12, 12):
            expected[one, other] += min(1, sum(a[one] * a[other] for a in fired[start : start + 8]))
    found = coactivation([hidden])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for blocks in ([hidden[:24], hidden[24:]], [hidden.relu()]):
        torch.testing.assert_close(coactivation(blocks), found)


def test_edges_are_counted_in_units_of_the_lowest_decile_that_is_not_zero():
    together = torch.zeros(10, 10)
    together[:, 5:] = torch.arange(1.0, 51.0).reshape(10, 5)
    deciles = np.percentile(together.numpy(), range(10, 101, 10))
    unit = 0.99 * deciles[deciles > 0][0]
    weights = graph_edges(together)
    assert weights.dtype == np.int64
    for row, column in np.ndindex(10, 10):
        value = 0 if row == column else int(float(together[row, column]) / unit)
        assert weights[row, column] == value
    assert not graph_edges(coactivation([-activations().abs()])).any()  # neurons that never fire


@by_every_method
def test_neurons_that_fire_together_become_one_part():
    """They fire in groups, one for every 8 tokens."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(8), 6))
    now = np.repeat(rng.integers(8, size=100), 8)
    noise = rng.normal(size=(800, 48))
    hidden = np.where(truth == now[:, None], np.abs(noise), -0.1 + 0.2 * (noise > 1.5))
    edges = graph_edges(coactivation([torch.from_numpy(hidden)]))
    assert alike(truth, divide_graph(edges, 8))
