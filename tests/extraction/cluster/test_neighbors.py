from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from moee_analysis.extraction.cluster.neighbors import METRICS, nearest

SCIPY = {"manhattan": "cityblock"}


@pytest.fixture(scope="module")
def points():
    """Tokens of 20 hidden neurons, three of them twice."""
    made = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    made[[3, 4, 5]] = made[[7, 8, 9]]
    return made


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_are_those_of_the_full_table_of_distances(points, metric):
    table = cdist(points.astype(np.float64), points, metric=SCIPY.get(metric, metric))
    ids, distances = nearest(points, 15, metric=metric)
    assert distances == pytest.approx(np.sort(table, axis=1)[:, :15], abs=1e-5)
    assert distances == pytest.approx(np.take_along_axis(table, ids, axis=1), abs=1e-5)


def test_each_point_is_its_own_first_neighbour_even_beside_a_copy(points):
    ids, distances = nearest(points, 5)
    assert ids[:, 0].tolist() == list(range(300))
    assert not distances[:, 0].any()
    assert ids[3, 1] == 7
    assert all(len(set(row)) == 5 for row in ids)


def test_a_token_without_direction_is_far_from_all_but_its_like(points):
    made = points.copy()
    made[[10, 20]] = 0
    ids, distances = nearest(made, 3)
    assert ids[10, :2].tolist() == [10, 20]
    assert distances[10] == pytest.approx([0, 0, 1])
