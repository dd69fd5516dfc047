from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hdbscan import HDBSCAN
from sklearn.metrics import adjusted_rand_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.distances import BATCH, Distances
from moee_analysis.extraction.cluster.exact_hdbscan import labels_of_tree
from moee_analysis.extraction.cluster.spanning_tree import Distinct, reachable, spanning_tree
from moee_analysis.extraction.record.hooks import TokenPlan
from moee_analysis.extraction.record.recording import record
from moee_analysis.models.loading import find_mlps, load_model
from tests.helpers.layers import same_partition

SETTINGS = [(2, "eom", None), (5, "eom", 40), (5, "leaf", None), (12, "eom", None)]


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
    centres = normal(6, dim, seed=8)
    return centres[np.arange(count) % 6] + spread * normal(count, dim)


POINTS = {
    "in the plane": normal(300, 2),
    "of 8 dimensions": normal(300, 8).astype(np.float32),
    "of 64 dimensions": normal(200, 64).astype(np.float32),
    "of 768 dimensions": normal(150, 768).astype(np.float32),
    "in half precision": normal(200, 16).astype(np.float16),
    "far from the origin": (normal(200, 32) + 1e4).astype(np.float32),
    "very far from the origin": normal(200, 32) + 1e9,
    "tiny": (1e-6 * normal(200, 32)).astype(np.float32),
    "huge": 1e30 * normal(200, 32).astype(np.float32),
    "of mixed scales": normal(200, 8) * 10.0 ** (np.arange(200) % 12 - 6)[:, None],
    "of mixed columns": (normal(200, 8) * 10.0 ** np.arange(-4, 4)).astype(np.float32),
    "almost twice": beside(normal(200, 64), 1e-7),
    "almost twice, in single precision": beside(normal(200, 64), 1e-6).astype(np.float32),
    "in tight groups": groups(240, 128, 1e-3).astype(np.float32),
    "in very tight groups": groups(240, 128, 1e-9),
    "some in a tight group": np.concatenate([normal(190, 64), 1e-6 * normal(10, 64)]),
    "with constant columns": normal(200, 8) * [1, 0, 1, 0, 0, 1, 1, 0]
    + [0, 7, 0, -1e6, 0, 0, 0, 3],
    "on a line": np.linspace(0, 1, 150)[:, None],
    "on a grid": grid(14, 14),
    "on a cube": grid(*[2] * 8).astype(np.float32),
    "all as far from each other": np.eye(60),
    "repeated": repeated(normal(200, 8)),
    "on a grid, repeated": repeated(grid(9, 9, 2)),
    "half of them equal": np.where(np.arange(200)[:, None] % 2, 0.0, normal(200, 16)),
    "all equal": np.ones((30, 4)),
    "of both zeros": np.where(grid(2, 2, 2, 3) == 0, -0.0, 1.0) * grid(2, 2, 2, 3),
    "two": normal(2, 3),
    "three": normal(3, 3),
    "two equal": np.ones((2, 5), np.float32),
}
every_kind = pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)


def plain(points, min_samples, **settings):
    model = HDBSCAN(
        min_samples=min_samples, algorithm="prims_kdtree", gen_min_span_tree=True, **settings
    )
    return model.fit(points.astype(np.float64))


def weights_of(model):
    return np.sort(model.minimum_spanning_tree_.to_numpy()[:, 2])


def labels_of(tree, setting):
    size, selection, most = setting
    return labels_of_tree(tree, min_cluster_size=size, max_cluster_size=most, selection=selection)


def slow_edges(points, min_samples):
    """Kruskal's tree of the full table of distances, ties by the order of the points."""
    points = points.astype(np.promote_types(points.dtype, np.float32))
    rows = Distinct.of(points).rows
    ordered = torch.from_numpy(points[rows])
    pairs = np.array(list(combinations(range(len(rows)), 2)))
    table = np.zeros((len(rows), len(rows)))
    exact = Distances.of(ordered).exact(*torch.from_numpy(pairs).T)
    table[tuple(pairs.T)] = exact
    table += table.T
    core = np.sort(table, axis=1)[:, min(min_samples, len(rows) - 1)]
    weights = np.maximum(np.maximum(table, core), core[:, None])[tuple(pairs.T)]
    group, edges = np.arange(len(rows)), []
    for one, other in pairs[np.argsort(weights, kind="stable")]:
        if group[one] != group[other]:
            group[group == group[other]] = group[one]
            edges.append((one, other))
    return rows[np.array(edges)]


# Exactly the tree


@every_kind
@pytest.mark.parametrize("min_samples", [1, 10])
def test_weights_are_those_of_plain_hdbscan(points, min_samples):
    tree = spanning_tree(points, min_samples)
    expected = weights_of(plain(points, min_samples))
    np.testing.assert_allclose(tree.weights, expected, rtol=1e-12, atol=0)
    assert (tree.edges.dtype, tree.edges.shape) == (np.int64, (len(points) - 1, 2))


@every_kind
def test_edges_are_those_of_the_full_table_of_distances(points):
    for min_samples in (2, 7):
        expected = slow_edges(points, min_samples)
        np.testing.assert_array_equal(spanning_tree(points, min_samples).edges, expected)


@every_kind
def test_neither_block_nor_order_of_the_rows_matters(points):
    order = np.random.default_rng(1).permutation(len(points))
    whole, other = spanning_tree(points, 6), spanning_tree(points[order], 6, block=7)
    np.testing.assert_array_equal(whole.weights, other.weights)
    np.testing.assert_array_equal(whole.edges, spanning_tree(points, 6, block=13).edges)
    for setting in SETTINGS:
        np.testing.assert_array_equal(labels_of(whole, setting)[order], labels_of(other, setting))


@every_kind
def test_equal_points_have_equal_labels(points):
    _, point = np.unique(points, axis=0, return_inverse=True)
    for min_samples in (1, 3, 20):
        tree = spanning_tree(points, min_samples)
        for setting in SETTINGS:
            labels = labels_of(tree, setting)
            assert len(set(zip(point, labels, strict=True))) == point.max() + 1


@pytest.mark.parametrize("seed", range(30))
def test_any_small_set_of_points(seed):
    rng = np.random.default_rng(seed)
    count, dim, min_samples = rng.integers([2, 1, 1], [70, 6, 15])
    points = rng.integers(0, rng.integers(1, 6), size=(count, dim)) / 8
    if seed % 2:
        points = repeated(points + np.round(8 * rng.normal(size=(count, 1))) / 8, seed=seed)
    tree = spanning_tree(points, int(min_samples), block=int(rng.integers(1, 40)))
    np.testing.assert_array_equal(tree.edges, slow_edges(points, min_samples))
    expected = weights_of(plain(points, int(min_samples)))
    np.testing.assert_allclose(tree.weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", [2, 8, 40])
def test_without_ties_labels_are_those_of_plain_hdbscan(seed, dim):
    points = groups(240, dim, 0.4) + 0.1 * normal(240, dim, seed=seed)
    tree = spanning_tree(points, 1)
    assert len(np.unique(tree.weights)) == len(points) - 1
    for size, selection, most in SETTINGS:
        expected = plain(
            points, 1, min_cluster_size=size, max_cluster_size=most or 0,
            cluster_selection_method=selection,
        ).labels_  # fmt: skip
        assert same_partition(labels_of(tree, (size, selection, most)), expected)


def test_clusters_of_real_activations_are_those_of_plain_hdbscan(tmp_path):
    model, images = load_model(), load_images(split="calibration", limit=16)
    site = find_mlps(model)[8]
    plan = TokenPlan(60, prefix=1)
    hidden = record(model, images, [site], plan=plan, root=tmp_path).layer(site).hidden
    tree = spanning_tree(hidden, 10)
    for selection in ("eom", "leaf"):
        found = plain(hidden, 10, min_cluster_size=10, cluster_selection_method=selection)
        np.testing.assert_allclose(tree.weights, weights_of(found), rtol=1e-12, atol=0)
        labels = labels_of(tree, (10, selection, None))
        assert labels.max() >= 2
        np.testing.assert_array_equal(labels == -1, found.labels_ == -1)
        assert adjusted_rand_score(labels, found.labels_) >= 0.999


# Exactly because bounds are bounds


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bound_exceeds_its_distance(points, dtype):
    points = torch.from_numpy(points.astype(np.promote_types(points.dtype, np.float32)))
    distances = Distances.of(points, dtype=dtype)
    everyone = torch.arange(len(points))
    pairs = torch.cartesian_prod(everyone, everyone).T
    exact = distances.exact(*pairs).reshape(len(points), -1)
    assert torch.equal(exact, exact.T)
    assert (distances.below(everyone).double() * distances.unit <= exact).all()


def test_bounds_are_close_where_points_are_apart():
    points = torch.from_numpy(POINTS["of 768 dimensions"])
    distances = Distances.of(points)
    everyone = torch.arange(len(points))
    near = distances.below(everyone[:1])[0] * distances.unit
    exact = distances.exact(torch.zeros_like(everyone), everyone)
    torch.testing.assert_close(near[1:].double(), exact[1:], rtol=1e-3, atol=0)


def test_a_pair_has_one_distance_in_any_company():
    distances = Distances.of(torch.from_numpy(normal(90, 33)))
    left, right = torch.randint(90, (2, 2 * BATCH + 5), generator=torch.Generator().manual_seed(0))
    whole = distances.exact(left, right)
    assert torch.equal(distances.exact(right[-7:], left[-7:]), whole[-7:])
    assert torch.equal(distances.exact(left[:0], right[:0]), whole[:0])


def test_products_are_precise_whatever_the_user_lets_pytorch_do():
    before = torch.get_float32_matmul_precision()
    tree = spanning_tree(POINTS["of 768 dimensions"], 5)
    torch.set_float32_matmul_precision("medium")
    try:
        other = spanning_tree(POINTS["of 768 dimensions"], 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(tree.edges, other.edges)
    assert tree.searched == other.searched


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("of 768 dimensions", torch.float32),
        ("far from the origin", torch.float32),
        ("in tight groups", torch.float64),
    ],
)
def test_precision_is_double_where_single_cannot_tell_neighbours_apart(kind, dtype):
    assert reachable(POINTS[kind], 10)[1].distances.factors.dtype == dtype


# In little time and memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made or filled while this is open."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def test_no_more_than_a_block_of_distances_is_held():
    points = groups(3000, 6, 0.5).astype(np.float32)
    with Largest() as largest:
        spanning_tree(points, 10, block=20)
    assert 20 * 3000 <= largest.elements < 2 * 20 * 3000 + 34 * BATCH
    assert reachable(points, 10, block=20)[1].distances.block.shape == (20, 3000)


def test_few_points_search_beyond_their_neighbours():
    assert spanning_tree(normal(2000, 12), 10).searched < 100


# Awkward input


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_points_that_are_not_numbers_are_refused(value):
    points = normal(20, 3)
    points[4, 1] = value
    with pytest.raises(MoeeError, match="finite"):
        spanning_tree(points, 2)


@pytest.mark.parametrize("scale", [1e-180, 1e180])
def test_distances_that_have_no_square_are_refused(scale):
    with pytest.raises(MoeeError, match="apart"):
        spanning_tree(scale * normal(20, 3), 2)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (5, 0), (7,)])
def test_what_has_no_tree_is_refused(shape):
    with pytest.raises(MoeeError, match="at least two points"):
        spanning_tree(np.zeros(shape), 2)


def test_a_core_distance_reaches_at_least_one_point_and_at_most_all():
    points = normal(12, 3)
    with pytest.raises(MoeeError, match="min_samples"):
        spanning_tree(points, 0)
    all_others, more = spanning_tree(points, 11), spanning_tree(points, 500)
    np.testing.assert_array_equal(all_others.weights, more.weights)


def test_all_equal_points_are_noise():
    tree = spanning_tree(POINTS["all equal"], 5)
    assert not tree.weights.any()
    for setting in SETTINGS:
        assert set(labels_of(tree, setting)) == {-1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_the_weights_are_the_same():
    for points in POINTS.values():
        here, there = spanning_tree(points, 6), spanning_tree(points, 6, device="cuda")
        np.testing.assert_allclose(here.weights, there.weights, rtol=1e-12, atol=0)
