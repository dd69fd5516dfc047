"""HDBSCAN's clusters: a spanning tree by products of matrices, hdbscan's own choice of clusters.

Campello, Moulavi and Sander (2013), with Zimek (2015), for the hierarchy and what is selected of
it; McInnes, Healy and Astels (2017) for the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moee_analysis.extraction.cluster.spanning_tree import SpanningTree, spanning_tree

FEW = 4  # dimensions up to which space trees are clearly faster
MANY = 20_000  # points beyond which that is many seconds

_PROBE = SpanningTree(  # two clusters of three points, far apart
    edges=np.array([[0, 1], [3, 4], [1, 2], [4, 5], [2, 3]]),
    weights=np.array([1.0, 1.0, 1.5, 1.5, 9.0]),
    searched=0,
)


@dataclass(frozen=True)
class Backend:
    """What finds the spanning tree, ``products`` of matrices or ``hdbscan`` alone, and why."""

    name: Literal["products", "hdbscan"]
    reason: str


def choose_backend(count: int, dim: int) -> Backend:
    """Choose what finds the spanning tree of ``count`` points of ``dim`` dimensions.

    Products of matrices, whose labels do not depend on the order of the rows, unless hdbscan's
    space trees save many seconds, or the installed hdbscan lacks the functions that take over
    from the tree. Seconds of the products / of hdbscan's fastest exact tree, on two cores, for
    activations of a DeiT-Tiny after PCA, after UMAP (8 dimensions) and as they are (768):

    ======  ===========  ===========  ===========  ===========  ==========
    points  2            4            8, UMAP      64           768
    ======  ===========  ===========  ===========  ===========  ==========
     2,500  0.06 / 0.03  0.06 / 0.07  0.08 / 0.06  0.11 / 0.48  0.4 / 6.7
    10,000  0.42 / 0.14  0.40 / 0.35  0.62 / 0.29  0.65 / 7.4   2.4 / 110
    20,000  1.3 / 0.4    1.1 / 0.9    2.0 / 0.8                 7.3 / –
    50,000  5.5 / 1.1    5.3 / 2.2
    ======  ===========  ===========  ===========  ===========  ==========

    The default of hdbscan is no faster; in up to 60 dimensions its tree is approximate.
    """
    trouble = _trouble()
    if trouble:
        return Backend("hdbscan", f"functions of the installed hdbscan have changed: {trouble}")
    if dim <= FEW and count > MANY:
        return Backend("hdbscan", f"{count} points of only {dim} dimensions: space trees pay")
    return Backend("products", f"{count} points of {dim} dimensions: products are fast enough")


def density_clusters(
    points: np.ndarray,
    *,
    min_samples: int,
    min_cluster_size: int,
    max_cluster_size: int | None = None,
    selection: Literal["eom", "leaf"] = "eom",
) -> np.ndarray:
    """Cluster of every row of ``points``, float (n, d), by HDBSCAN; -1 for noise.

    Sizes are numbers of points, and ``min_samples`` as for :func:`spanning_tree`, so are errors.
    """
    flat = {
        "min_cluster_size": min_cluster_size,
        "max_cluster_size": max_cluster_size,
        "selection": selection,
    }
    if choose_backend(*points.shape).name == "products":
        return labels_of_tree(spanning_tree(points, min_samples), **flat)
    from hdbscan import HDBSCAN

    clusterer = HDBSCAN(min_samples=min_samples, approx_min_span_tree=False, **_in_hdbscan(**flat))
    return clusterer.fit_predict(points.astype(np.float64))


def labels_of_tree(
    tree: SpanningTree,
    *,
    min_cluster_size: int,
    max_cluster_size: int | None = None,
    selection: Literal["eom", "leaf"] = "eom",
) -> np.ndarray:
    """Cluster of every point of ``tree``, -1 for noise: one tree serves for many settings.

    The only place that calls functions of hdbscan that it does not promise to keep.
    """
    from hdbscan._hdbscan_linkage import label
    from hdbscan.hdbscan_ import _tree_to_labels

    hierarchy = label(np.column_stack([tree.edges, tree.weights]))
    flat = _in_hdbscan(min_cluster_size, max_cluster_size, selection)
    return _tree_to_labels(None, single_linkage_tree=hierarchy, **flat)[0]


def _in_hdbscan(
    min_cluster_size: int, max_cluster_size: int | None, selection: str
) -> dict[str, object]:
    """The settings in hdbscan's words."""
    return {
        "min_cluster_size": min_cluster_size,
        "max_cluster_size": max_cluster_size or 0,
        "cluster_selection_method": selection,
    }


def _trouble() -> str:
    """What is wrong with hdbscan's private functions, nothing if they do what they should."""
    try:
        labels = labels_of_tree(_PROBE, min_cluster_size=3)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    return "" if sorted(labels) == [0, 0, 0, 1, 1, 1] else f"labels {labels.tolist()} of a probe"
