"""Clusters of hidden activations: reduce, cluster, then decide whether to trust the result.

MoEE (CVPR 2025), phase 1: HDBSCAN on the activations of every layer on its own; a layer in which
no clusters are found stays dense.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.spanning_tree import SpanningTree, spanning_tree
from moee_analysis.extraction.config import ClusterConfig

NOISE = -1
KMEANS_STEPS = 25  # more of them change little
FEW = 4  # dimensions up to which space trees are clearly faster
MANY = 20_000  # points beyond which that is many seconds


@dataclass(frozen=True)
class Clusters:
    """Cluster of every token (int, -1 is noise); ``reason`` says why a layer must stay dense."""

    labels: np.ndarray
    reason: str = ""

    @property
    def count(self) -> int:
        """Number of clusters, noise not counted."""
        return int(self.labels.max(initial=NOISE)) + 1

    @property
    def noise_share(self) -> float:
        """Share of the tokens that belong to no cluster."""
        return float(np.mean(self.labels == NOISE))


def cluster(activations: np.ndarray, config: ClusterConfig, *, seed: int = 0) -> Clusters:
    """Cluster the rows of ``activations``, float (tokens, hidden).

    Raises MoeeError: NaN or infinite activations; fewer tokens than UMAP or HDBSCAN need.
    """
    config = config.for_width(np.shape(activations)[-1])
    points = reduce_dimensions(activations, config, seed=seed)
    return assess(label(points, config, seed=seed), config)


def assess(labels: np.ndarray, config: ClusterConfig) -> Clusters:
    """Decide whether ``labels`` can make experts: two clusters at least, not too much noise."""
    found, most = Clusters(labels), config.max_noise
    if config.method == "random":  # what is not a centre is no noise
        return found
    if found.count < 2:
        return Clusters(labels, f"{found.count} clusters found")
    if found.noise_share > most:
        return Clusters(labels, f"{found.noise_share:.0%} noise, more than max_noise={most:.0%}")
    return found


def reduce_dimensions(points: np.ndarray, config: ClusterConfig, *, seed: int = 0) -> np.ndarray:
    """Reduce ``points`` (tokens, hidden) to float32 (tokens, components); raises as `cluster`."""
    config = config.for_width(np.shape(points)[-1])
    points = np.asarray(points, dtype=np.float32)
    if not np.isfinite(points).all():
        raise MoeeError("finite activations", "NaN or infinity", "check the weights and images")
    needed = max(config.min_samples, config.components, 2) + 2
    if len(points) < needed:
        hint = "take more images or tokens"
        raise MoeeError(f"at least {needed} tokens to cluster", str(len(points)), hint)
    if config.reduce == "none":
        return points
    if (points == points[0]).all():  # a dead layer: neither PCA nor UMAP can divide by zero
        return np.zeros((len(points), config.components), dtype=np.float32)
    if config.reduce == "pca":
        from sklearn.decomposition import PCA

        components = min(config.components, *points.shape)
        return PCA(components, svd_solver="covariance_eigh").fit_transform(points)
    return _umap(points, config, seed)


def label(points: np.ndarray, config: ClusterConfig, *, seed: int = 0) -> np.ndarray:
    """Cluster of every row of ``points`` (tokens, any), -1 for none; ``config`` has a ``count``."""
    return CLUSTERERS[config.method](points, config, seed)


def _hdbscan(points: np.ndarray, config: ClusterConfig, _seed: int) -> np.ndarray:
    """By density: HDBSCAN of Campello, Moulavi and Sander (2013), with Zimek (2015)."""
    if (points == points[0]).all():
        return np.full(len(points), NOISE)
    least, most = config.min_cluster_size, config.max_cluster_size
    sizes = {
        "min_cluster_size": max(2, round(least * len(points))),
        "max_cluster_size": 0 if most is None else max(2, round(most * len(points))),
    }
    # Seconds of the products / of hdbscan's fastest exact tree, on two cores, for 20,000 tokens:
    # 1.3 / 0.4 in 2 dimensions, 1.1 / 0.9 in 4, 2.0 / 0.8 in 8, after UMAP; for 10,000 of them:
    # 0.65 / 7.4 in 64 dimensions, 2.4 / 110 in 768; for 50,000: 5.5 / 1.1 in 2, 5.3 / 2.2 in 4.
    if len(points) <= MANY or points.shape[1] > FEW:
        return label_tree(spanning_tree(points, config.min_samples), **sizes)
    from hdbscan import HDBSCAN

    model = HDBSCAN(min_samples=config.min_samples, approx_min_span_tree=False, **sizes)
    return model.fit_predict(points.astype(np.float64))


def label_tree(tree: SpanningTree, **sizes: int) -> np.ndarray:
    """Cluster of every point of ``tree``, -1 for noise, by the library of McInnes et al. (2017)."""
    from hdbscan import HDBSCAN

    # hdbscan takes distances that are known for some pairs: those of the tree, which is then their
    # only spanning tree. Points as near to themselves as can be have core distances below all
    # weights. Weights of equal edges are set a unit of the last digit apart, to keep their order.
    places = np.arange(len(tree.order))
    steps = places[:-1]
    units = np.maximum(tree.weights.view(np.int64), 2)  # nothing would be no edge
    weights = (np.maximum.accumulate(units - steps) + steps).view(np.float64)
    data = np.append(weights, np.full(len(places), np.nextafter(0, 1)))
    row, column = (np.append(ends, places) for ends in tree.edges.T)
    model = HDBSCAN(metric="precomputed", min_samples=1, **sizes)
    labels = np.empty(len(places), dtype=np.int64)
    labels[tree.order] = model.fit_predict(coo_matrix((data, (row, column))).tocsr())
    return labels


def _kmeans(points: np.ndarray, config: ClusterConfig, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    count = min(config.count, len(np.unique(points, axis=0)))
    return KMeans(count, n_init=1, max_iter=KMEANS_STEPS, random_state=seed).fit_predict(points)


def _random(points: np.ndarray, config: ClusterConfig, seed: int) -> np.ndarray:
    """Random tokens are centres, each alone in its cluster."""
    labels, count = np.full(len(points), NOISE), min(config.count, len(points))
    labels[np.random.default_rng(seed).choice(len(points), count, replace=False)] = range(count)
    return labels


CLUSTERERS: dict[str, Callable[[np.ndarray, ClusterConfig, int], np.ndarray]] = {
    "hdbscan": _hdbscan,
    "kmeans": _kmeans,
    "random": _random,
}
"""By ``ClusterConfig.method``: points (tokens, any), settings and seed to labels, -1 for none."""


def _umap(points: np.ndarray, config: ClusterConfig, seed: int) -> np.ndarray:
    from umap import umap_

    with suppress(RuntimeError, AttributeError):  # no folder to write to; another UMAP
        # What takes longest to compile is left on disk for the next process.
        umap_.smooth_knn_dist.enable_caching()
        umap_.compute_membership_strengths.enable_caching()
    neighbors = min(config.neighbors, len(points) - 1)
    reducer = umap_.UMAP(  # a seeded one is sequential
        n_components=config.components, n_neighbors=neighbors, metric="cosine", min_dist=0.0,
        precomputed_knn=(*nearest(points, neighbors), None), n_epochs=config.epochs,
        random_state=seed, n_jobs=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "precomputed_knn")  # nothing new is transformed
            return reducer.fit_transform(points)
    finally:  # numba, inside UMAP, sets the threads of the OpenMP pool that torch shares
        torch.set_num_threads(threads)


def nearest(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosine distances of the ``count`` nearest of ``points`` (n, dim), itself the first.

    Ids are int32 and distances float32, both (n, count). For some thousand tokens brute force is
    faster than UMAP's own approximate search, which compiles for longer than it runs.
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
    ids = np.insert(ids, 0, np.arange(len(points)), axis=1).astype(np.int32)
    return ids, np.insert(distances**2 / 2, 0, 0, axis=1).astype(np.float32)
