"""Clusters of hidden activations: reduce, then HDBSCAN, then decide whether to trust the result.

MoEE (CVPR 2025), phase 1: HDBSCAN on the activations of every layer on its own; a layer in which
no clusters are found stays dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.exact_hdbscan import density_clusters
from moee_analysis.extraction.cluster.neighbors import METRICS, nearest
from moee_analysis.utils.checks import not_none, one_of, real_number, share, whole_number

METHODS = ("hdbscan", "kmeans", "random")
SPACES = ("hidden", "inputs")
REDUCTIONS = ("umap", "pca", "none")
SELECTIONS = ("eom", "leaf")
NOISE = -1
MEAN_STEPS = 25  # of k-means; more of them change little


@dataclass(frozen=True)
class ClusterConfig:
    """How the tokens of one layer are clustered.

    ``method`` is ``hdbscan``, which finds the number of clusters by itself, ``kmeans``, or
    ``random`` (the control: random tokens as centres). ``space`` is the ``hidden`` activations,
    or the ``inputs`` in the metric of the outputs. ``reduce="none"`` is the paper taken literally;
    on raw activations HDBSCAN calls most tokens noise, so the default reduces with UMAP first.
    Fewer tokens than ``count`` make fewer clusters.
    """

    method: Literal["hdbscan", "kmeans", "random"] = "hdbscan"
    space: Literal["hidden", "inputs"] = "hidden"
    count: int | None = 32  # clusters of k-means, or random centres; None: see ``for_width``
    reduce: Literal["umap", "pca", "none"] = "umap"
    components: int | None = 8  # dimensions after the reduction; None: see ``for_width``
    neighbors: int = 30  # UMAP's neighbourhood
    epochs: int = 200  # UMAP's optimisation; its own default is 500 below 10,000 tokens
    metric: Literal["cosine", "euclidean", "manhattan", "correlation"] = "cosine"  # UMAP's alone
    min_samples: int = 10  # never left to hdbscan's default, which is min_cluster_size
    min_cluster_size: float = 0.01  # as a share of the clustered tokens
    max_cluster_size: float | None = 0.25  # likewise; None lets one cluster take everything
    selection: Literal["eom", "leaf"] = "eom"
    max_noise: float = 0.8  # a layer with a larger share of noise stays dense

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("space", self.space, SPACES)
        one_of("reduce", self.reduce, REDUCTIONS)
        one_of("selection", self.selection, SELECTIONS)
        one_of("metric", self.metric, METRICS)
        share("min_cluster_size", self.min_cluster_size)
        share("max_noise", self.max_noise)
        if self.max_cluster_size is not None:
            real_number(
                "max_cluster_size", self.max_cluster_size, least=self.min_cluster_size, most=1
            )
        for name in ("epochs", "min_samples"):
            whole_number(name, getattr(self, name))
        for name, value in not_none(self, "count", "components"):
            whole_number(name, value)
        whole_number("neighbors", self.neighbors, least=2)  # UMAP counts the token itself

    def for_width(self, hidden: int) -> ClusterConfig:
        """Fill in ``count`` and ``components``, if None, for a layer of so many hidden neurons.

        A cluster for every 12 neurons, so that routers and shifts stay small beside the weights,
        and 64 at most, so that every expert has enough tokens to be known by, and to be computed
        with few at a time; a component for every 48 neurons, that is, usually for every 12 inputs.
        """
        count = min(max(hidden // 12, 2), 64) if self.count is None else self.count
        components = max(hidden // 48, 2) if self.components is None else self.components
        return replace(self, count=count, components=components)


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

    Raises
    ------
    MoeeError
        NaN or infinite activations; fewer tokens than UMAP or HDBSCAN need.
    """
    config = config.for_width(np.shape(activations)[-1])
    points = reduce_dimensions(activations, config, seed=seed)
    return judged(labels_of(points, config, seed=seed), config)


def judged(labels: np.ndarray, config: ClusterConfig) -> Clusters:
    """Decide whether ``labels`` can make experts: two clusters at least, not too much noise."""
    found = Clusters(labels)
    if config.method == "random":  # what is not a centre is no noise
        return found
    if found.count < 2:
        return Clusters(labels, f"{found.count} clusters found")
    if found.noise_share > config.max_noise:
        return Clusters(
            labels, f"{found.noise_share:.0%} noise, more than max_noise={config.max_noise:.0%}"
        )
    return found


def reduce_dimensions(
    points: np.ndarray, config: ClusterConfig, *, seed: int = 0, components: int | None = None
) -> np.ndarray:
    """Reduce ``points`` (tokens, hidden) as ``config`` says, to float32 (tokens, components).

    Raises
    ------
    MoeeError
        As for :func:`cluster`.
    """
    config = config.for_width(np.shape(points)[-1])
    points = _checked(points, config)
    components = components or config.components
    if config.reduce == "none":
        return points
    if _constant(points):  # a dead layer: neither PCA nor UMAP can divide by zero
        return np.zeros((len(points), components), dtype=np.float32)
    if config.reduce == "pca":
        from sklearn.decomposition import PCA

        components = min(components, *points.shape)
        return PCA(components, svd_solver="covariance_eigh").fit_transform(points)
    return _umap(points, config, components=components, seed=seed)


def _umap(points: np.ndarray, config: ClusterConfig, *, components: int, seed: int) -> np.ndarray:
    from umap.umap_ import UMAP

    _keep_compiled()
    neighbors = min(config.neighbors, len(points) - 1)
    reducer = UMAP(
        n_components=components,
        n_neighbors=neighbors,
        metric=config.metric,
        precomputed_knn=(*nearest(points, neighbors, metric=config.metric), None),
        min_dist=0.0,
        n_epochs=config.epochs,
        random_state=seed,
        n_jobs=1,  # a seeded UMAP is sequential
    )
    with _same_torch_threads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "precomputed_knn")  # nothing new is transformed
        return reducer.fit_transform(points)


def _keep_compiled() -> None:
    """Let numba keep what takes longest to compile in UMAP on disk, for the next process."""
    from umap import umap_

    with suppress(RuntimeError, AttributeError):  # no folder to write to; another UMAP
        umap_.smooth_knn_dist.enable_caching()
        umap_.compute_membership_strengths.enable_caching()


@contextmanager
def _same_torch_threads() -> Iterator[None]:
    """Keep torch's number of threads: numba, inside UMAP, sets that of the shared OpenMP pool."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def labels_of(points: np.ndarray, config: ClusterConfig, *, seed: int = 0) -> np.ndarray:
    """Cluster of every row of ``points`` (tokens, any), -1 for none, by ``config.method``.

    The configuration has a ``count``.
    """
    if config.method == "hdbscan":
        return density_labels(points, config)
    count = min(config.count, len(points))
    if config.method == "kmeans":
        return mean_labels(points, count, seed=seed)
    centres = np.random.default_rng(seed).choice(len(points), size=count, replace=False)
    labels = np.full(len(points), NOISE)
    labels[centres] = np.arange(count)
    return labels


def mean_labels(points: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Cluster of every row of ``points`` (tokens, any) by k-means."""
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(points, axis=0)))
    return KMeans(count, n_init=1, max_iter=MEAN_STEPS, random_state=seed).fit_predict(points)


def density_labels(points: np.ndarray, config: ClusterConfig) -> np.ndarray:
    """Cluster of every row of ``points`` (tokens, any) by HDBSCAN, -1 for noise.

    Points in another order get the same labels, unless hdbscan is left to find its tree alone
    (``choose_backend``).
    """
    if _constant(points):
        return np.full(len(points), NOISE)
    most = config.max_cluster_size
    return density_clusters(
        points,
        min_samples=config.min_samples,
        min_cluster_size=max(2, round(config.min_cluster_size * len(points))),
        max_cluster_size=None if most is None else max(2, round(most * len(points))),
        selection=config.selection,
    )


def _constant(points: np.ndarray) -> bool:
    return bool((points == points[0]).all())


def _checked(points: np.ndarray, config: ClusterConfig) -> np.ndarray:
    points = np.asarray(points, dtype=np.float32)
    if not np.isfinite(points).all():
        raise MoeeError("finite activations", "NaN or infinity", "check the weights and images")
    needed = max(config.min_samples, config.components, 2) + 2
    if len(points) < needed:
        raise MoeeError(
            f"at least {needed} tokens to cluster", str(len(points)), "take more images or tokens"
        )
    return points
