"""Exact nearest neighbours of tokens among themselves."""

from __future__ import annotations

import numpy as np

METRICS = ("cosine", "euclidean", "manhattan", "correlation")


def nearest(
    points: np.ndarray, count: int, *, metric: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and distances of the ``count`` nearest points, each point itself the first of them.

    Brute force over blocks of distances. At the few thousand tokens that are clustered it is faster
    than UMAP's own approximate search, which compiles for longer than it runs.

    Parameters
    ----------
    points
        Float (points, dim).
    metric
        One of :data:`METRICS`.

    Returns
    -------
    tuple
        Ids, int32, and distances, float32; both (points, count), nearest first.
    """
    from sklearn.neighbors import NearestNeighbors

    flat, inner = _as_euclidean(points, metric)
    search = NearestNeighbors(n_neighbors=count - 1, metric=inner, algorithm="brute")
    distances, ids = search.fit(flat).kneighbors()  # without the point itself
    if inner != metric:
        distances = distances**2 / 2
    own = np.arange(len(points))[:, None]
    return (
        np.hstack([own, ids]).astype(np.int32),
        np.hstack([np.zeros_like(own), distances]).astype(np.float32),
    )


def _as_euclidean(points: np.ndarray, metric: str) -> tuple[np.ndarray, str]:
    """Points whose ``inner`` distances order them as ``metric`` does, and that metric.

    Cosine distance is half the squared Euclidean distance of unit rows, and correlation distance
    the same of centred rows; scikit-learn searches those by matrix products, fused. A row without
    direction gets a dimension of its own, at distance 1 from all others.
    """
    if metric not in ("cosine", "correlation"):
        return points, metric
    if metric == "correlation":
        points = points - points.mean(axis=1, keepdims=True)
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit = np.divide(points, length, out=np.zeros_like(points), where=length > 0)
    return np.hstack([unit, length == 0]).astype(points.dtype), "euclidean"
