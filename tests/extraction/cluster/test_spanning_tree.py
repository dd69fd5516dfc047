from itertools import combinations

import numpy as np
import pytest
import torch
from hdbscan import HDBSCAN
from sklearn.metrics import adjusted_rand_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster import clustering
from moee_analysis.extraction.cluster import spanning_tree as bounds
from moee_analysis.extraction.cluster.clustering import label_tree
from moee_analysis.extraction.cluster.spanning_tree import (
    BATCH,
    Distances,
    find_neighbours,
    spanning_tree,
)
from moee_analysis.extraction.config import ClusterConfig
from moee_analysis.models.capture import capture
from tests.helpers.layers import same_partition

SETTINGS = [(2, 0), (5, 40), (12, 0)]  # smallest and largest clusters


def normal(count, dim, *, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim))


def grid(*sides):
    return np.stack(np.meshgrid(*map(range, sides)), axis=-1).reshape(-1, len(sides))


def repeated(points, *, seed=0):
    return points[np.random.default_rng(seed).integers(0, len(points), size=len(points))]


def beside(points, gap):
    """Half of the points, and others as near to them as ``gap``."""
    half = points[: len(points) // 2]
    return np.concatenate([half, half + gap * normal(*half.shape, seed=9)])


def groups(count, dim, spread):
    return normal(6, dim, seed=8)[np.arange(count) % 6] + spread * normal(count, dim)


POINTS = {
    "of 8 dimensions": normal(100, 8).astype(np.float32),
    "of 768 dimensions": normal(60, 768).astype(np.float32),
    "in half precision": normal(100, 16).astype(np.float16),
    "far from the origin": (normal(100, 32) + 1e4).astype(np.float32),
    "very far from the origin": normal(100, 32) + 1e9,
    "tiny": (1e-6 * normal(100, 32)).astype(np.float32),
    "huge": 1e30 * normal(100, 32).astype(np.float32),
    "of mixed scales": normal(100, 8) * 10.0 ** (np.arange(100) % 12 - 6)[:, None],
    "almost twice": beside(normal(100, 64), 1e-7),
    "almost twice, in single precision": beside(normal(100, 64), 1e-6).astype(np.float32),
    "in tight groups": groups(240, 128, 1e-3).astype(np.float32),
    "in very tight groups": groups(120, 128, 1e-9),
    "with constant columns": normal(100, 4) * [1, 0, 1, 0] + [0, 7, 0, -1e6],
    "on a grid": grid(10, 10),
    "on a cube": grid(*[2] * 6).astype(np.float32),
    "all as far from each other": np.eye(40),
    "on a grid, repeated": repeated(grid(7, 7, 2)),
    "half of them equal": np.where(np.arange(100)[:, None] % 2, 0.0, normal(100, 16)),
    "all equal": np.ones((30, 4)),
    "of both zeros": np.where(grid(2, 2, 2, 3) == 0, -0.0, 1.0) * grid(2, 2, 2, 3),
    "two": normal(2, 3),
    "two equal": np.ones((2, 5), np.float32),
}
every_kind = pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)


def precise(points):
    """The points as a tensor of single or double precision."""
    return torch.from_numpy(points.astype(np.promote_types(points.dtype, np.float32)))


def set_rows(monkeypatch, rows):
    """Let blocks have so many rows."""
    monkeypatch.setattr(bounds, "ROOM", 1)
    monkeypatch.setattr(bounds, "ROWS", rows)


def plain_hdbscan(points, min_samples, size=5, most=0):
    model = HDBSCAN(
        min_samples=min_samples, min_cluster_size=size, max_cluster_size=most,
        algorithm="prims_kdtree", gen_min_span_tree=True,
    )  # fmt: skip
    return model.fit(points.astype(np.float64))


def label(tree, setting):
    return label_tree(tree, min_cluster_size=setting[0], max_cluster_size=setting[1])


def slow_edges(points, min_samples, rows):
    """Kruskal's tree of the full table of distances, ties by the order of ``rows``."""
    pairs = np.array(list(combinations(range(len(rows)), 2)))
    table = np.zeros((len(rows), len(rows)))
    table[tuple(pairs.T)] = Distances.of(precise(points)[rows]).exact(*torch.from_numpy(pairs).T)
    table += table.T
    core = np.sort(table, axis=1)[:, min(min_samples, len(rows) - 1)]
    weights = np.maximum(np.maximum(table, core), core[:, None])[tuple(pairs.T)]
    group, edges = np.arange(len(rows)), []
    for one, other in pairs[np.argsort(weights, kind="stable")]:
        if group[one] != group[other]:
            group[group == group[other]] = group[one]
            edges.append((one, other))
    return np.array(edges)


def check_tree(points, min_samples):
    """The tree is that of the full table, and its weights are those of plain hdbscan."""
    tree = spanning_tree(points, min_samples)
    assert sorted(tree.order) == list(range(len(points)))
    np.testing.assert_array_equal(tree.edges, slow_edges(points, min_samples, tree.order))
    plain = plain_hdbscan(points, min_samples).minimum_spanning_tree_.to_numpy()[:, 2]
    np.testing.assert_allclose(tree.weights, np.sort(plain), rtol=1e-12, atol=0)


@every_kind
@pytest.mark.parametrize("min_samples", [1, 2, 10])
def test_the_tree_is_exact(points, min_samples):
    check_tree(points, min_samples)


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_of_any_small_set_of_points_is_exact(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    set_rows(monkeypatch, int(rng.integers(1, 40)))
    count, dim, min_samples = rng.integers([2, 1, 1], [70, 6, 15])
    points = rng.integers(0, rng.integers(1, 6), size=(count, dim)) / 8
    if seed % 2:
        points = repeated(points + np.round(8 * rng.normal(size=(count, 1))) / 8, seed=seed)
    check_tree(points, int(min_samples))


@every_kind
def test_neither_block_nor_order_matters_and_equal_points_have_equal_labels(points, monkeypatch):
    order = np.random.default_rng(1).permutation(len(points))
    _, point = np.unique(points, axis=0, return_inverse=True)
    whole = spanning_tree(points, 6)
    set_rows(monkeypatch, 7)
    other = spanning_tree(points[order], 6)
    np.testing.assert_array_equal(whole.weights, other.weights)
    for setting in SETTINGS:
        labels = label(whole, setting)
        np.testing.assert_array_equal(labels[order], label(other, setting))
        assert len(set(zip(point, labels, strict=True))) == point.max() + 1


@pytest.mark.parametrize("dim", [2, 8, 40])
def test_without_ties_labels_are_those_of_plain_hdbscan(dim, monkeypatch):
    points = groups(240, dim, 0.4) + 0.1 * normal(240, dim, seed=3)
    tree = spanning_tree(points, 1)
    assert len(np.unique(tree.weights)) == len(points) - 1
    for size, most in SETTINGS:
        expected = plain_hdbscan(points, 1, size, most).labels_
        assert same_partition(label(tree, (size, most)), expected)
        config = ClusterConfig(
            min_samples=1, min_cluster_size=size / 240, max_cluster_size=most / 240 or None
        )
        np.testing.assert_array_equal(clustering.label(points, config), label(tree, (size, most)))
        with monkeypatch.context() as patch:  # as of very many points in a plane
            patch.setattr(clustering, "MANY", 100)
            patch.setattr(clustering, "FEW", dim)
            patch.setattr(clustering, "spanning_tree", lambda *_: pytest.fail("slower"))
            assert same_partition(clustering.label(points, config), expected)


def test_clusters_of_real_activations_are_those_of_plain_hdbscan(bundled, bundled_images):
    with torch.no_grad(), capture(bundled, ["blocks.8.mlp.act"], "outputs") as seen:
        bundled(next(bundled_images["calibration"].batches(bundled, batch_size=16)))
    hidden = seen["blocks.8.mlp.act"].flatten(0, 1).numpy()
    tree, plain = spanning_tree(hidden, 10), plain_hdbscan(hidden, 10, 10)
    weights = np.sort(plain.minimum_spanning_tree_.to_numpy()[:, 2])
    np.testing.assert_allclose(tree.weights, weights, rtol=1e-12, atol=0)
    labels = label(tree, (10, 0))
    assert labels.max() >= 2
    np.testing.assert_array_equal(labels == -1, plain.labels_ == -1)
    assert adjusted_rand_score(labels, plain.labels_) >= 0.999


def test_all_equal_points_are_noise_and_so_are_too_few():
    tree = spanning_tree(POINTS["all equal"], 5)
    assert not tree.weights.any()
    assert {*label(tree, (2, 0)), *label(spanning_tree(normal(50, 3), 3), (1000, 0))} == {-1}


# Exactly because bounds are bounds


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bound_exceeds_its_distance(points, dtype):
    distances, everyone = Distances.of(precise(points), dtype), torch.arange(len(points))
    exact = distances.exact(*torch.cartesian_prod(everyone, everyone).T).view(len(points), -1)
    assert torch.equal(exact, exact.T)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # whatever the user lets PyTorch do
    try:
        assert (distances.below(everyone).double() * distances.unit <= exact).all()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_pair_has_one_distance_in_any_company():
    distances = Distances.of(torch.from_numpy(normal(90, 33)))
    left, right = torch.randint(90, (2, 2 * BATCH + 5), generator=torch.Generator().manual_seed(0))
    whole = distances.exact(left, right)
    assert torch.equal(distances.exact(right[-7:], left[-7:]), whole[-7:])
    assert torch.equal(distances.exact(left[:0], right[:0]), whole[:0])


@pytest.mark.parametrize(("kind", "dtype"), [
    ("of 768 dimensions", torch.float32), ("far from the origin", torch.float32),
    ("in tight groups", torch.float64),
])  # fmt: skip
def test_precision_is_double_where_single_cannot_tell_neighbours_apart(kind, dtype):
    assert find_neighbours(POINTS[kind], 10).distances.factors.dtype == dtype


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made or filled while this is open."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


def test_no_more_than_a_block_of_distances_is_held(monkeypatch):
    set_rows(monkeypatch, 20)
    points = groups(2000, 6, 0.5).astype(np.float32)
    with Largest() as largest:
        spanning_tree(points, 10)
    assert 20 * 2000 <= largest.elements < 2 * 20 * 2000 + 50 * BATCH


def test_few_points_search_beyond_their_neighbours():
    assert spanning_tree(normal(2000, 12), 10).searched < 100


# Awkward input


@pytest.mark.parametrize(("points", "message"), [
    (np.where(np.arange(20)[:, None] == 4, np.nan, normal(20, 3)), "finite"),
    (np.where(np.arange(20)[:, None] == 4, np.inf, normal(20, 3)), "finite"),
    (1e-180 * normal(20, 3), "apart"), (1e180 * normal(20, 3), "apart"),
])  # fmt: skip
def test_points_without_a_tree_are_refused(points, message):
    with pytest.raises(MoeeError, match=message):
        spanning_tree(points, 2)


def test_a_core_distance_reaches_at_most_all_points():
    points = normal(12, 3)
    all_others, more = spanning_tree(points, 11), spanning_tree(points, 500)
    np.testing.assert_array_equal(all_others.weights, more.weights)
