from __future__ import annotations

import itertools

import numpy as np
import pytest

from moee_analysis.baselines.common.balanced_kmeans import balanced_kmeans, means


def inertia(points, labels, clusters):
    return ((points - means(points, labels, clusters)[labels]) ** 2).sum()


@pytest.mark.parametrize(("count", "clusters"), [(24, 4), (25, 4), (7, 7), (9, 1)])
def test_sizes_differ_by_one_at_most(count, clusters):
    points = np.random.default_rng(count).normal(size=(count, 3))
    sizes = np.bincount(balanced_kmeans(points, clusters), minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == count


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


def test_the_seed_decides():
    points = np.random.default_rng(1).normal(size=(60, 5))
    np.testing.assert_array_equal(balanced_kmeans(points, 6), balanced_kmeans(points, 6))
    assert (balanced_kmeans(points, 6) != balanced_kmeans(points, 6, seed=1)).any()


def test_equal_points_are_dealt_out():
    assert list(np.bincount(balanced_kmeans(np.ones((12, 2)), 3))) == [4, 4, 4]
