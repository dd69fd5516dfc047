"""Exact nearest neighbours of tokens among themselves, by cosine."""

from __future__ import annotations

import numpy as np


def nearest(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosine distances of the ``count`` nearest of ``points`` (n, dim), itself the first.

    Ids are int32 and distances float32, both (n, count), nearest first. Brute force over blocks:
    for the few thousand tokens that are clustered it is faster than UMAP's own approximate
    search, which compiles for longer than it runs.
    """
    from sklearn.neighbors import NearestNeighbors

    # Cosine distance is half the squared Euclidean distance of unit rows, which scikit-learn
    # searches by matrix products, fused. A row without direction gets a dimension of its own,
    # at distance 1 from all others.
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit = np.divide(points, length, out=np.zeros_like(points), where=length > 0)
    unit = np.hstack([unit, length == 0]).astype(points.dtype)
    search = NearestNeighbors(n_neighbors=count - 1, algorithm="brute")
    distances, ids = search.fit(unit).kneighbors()  # without the point itself
    own = np.arange(len(points))[:, None]
    return (
        np.hstack([own, ids]).astype(np.int32),
        np.hstack([np.zeros_like(own), distances**2 / 2]).astype(np.float32),
    )
