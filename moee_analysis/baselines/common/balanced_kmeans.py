"""k-means whose clusters have equal sizes."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


def balanced_kmeans(
    points: np.ndarray, clusters: int, *, rounds: int = 20, seed: int = 0
) -> np.ndarray:
    """Divide ``points`` (n, d) into clusters whose sizes differ by one at most.

    k-means++ starts; then every round assigns all points at once, at the least total squared
    distance that equal sizes allow (an exact linear assignment), and moves the centres to the
    means. It stops when nothing changes; the best round counts.

    Returns
    -------
    ndarray
        Cluster of each point, int64 (n,).
    """
    centres = _plus_plus(points, clusters, np.random.default_rng(seed))
    best, least = np.zeros(len(points), dtype=np.int64), np.inf
    for _ in range(rounds):
        labels = _assign(points, centres)
        centres = means(points, labels, clusters)
        inertia = float(((points - centres[labels]) ** 2).sum())
        if not inertia < least:
            break
        best, least = labels, inertia
    return best


def means(points: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """Mean of every cluster's points, (clusters, d)."""
    sums = np.zeros((clusters, points.shape[1]))
    np.add.at(sums, labels, points)
    return sums / np.bincount(labels, minlength=clusters)[:, None]


def _plus_plus(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Centres drawn from the points, each likelier the farther it is from those before it."""
    chosen = [int(rng.integers(len(points)))]
    nearest = cdist(points, points[chosen], "sqeuclidean")[:, 0]
    for _ in range(clusters - 1):
        total = nearest.sum()
        weights = nearest / total if total > 0 else None
        chosen.append(int(rng.choice(len(points), p=weights)))
        nearest = np.minimum(nearest, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
    return points[chosen].astype(np.float64)


def _assign(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Cluster of each point: every centre stands in as many columns as it may take points."""
    sizes = np.full(len(centres), len(points) // len(centres))
    sizes[: len(points) % len(centres)] += 1
    owner = np.repeat(np.arange(len(centres)), sizes)
    rows, columns = linear_sum_assignment(cdist(points, centres, "sqeuclidean")[:, owner])
    labels = np.empty(len(points), dtype=np.int64)
    labels[rows] = owner[columns]
    return labels
