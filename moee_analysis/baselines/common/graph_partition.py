"""Division of a weighted graph into parts of equal size that few edges join.

By METIS (Karypis and Kumar, "A Fast and High Quality Multilevel Scheme for Partitioning Irregular
Graphs", 1998), which needs the optional package ``pymetis`` (``pip install moee-analysis[graph]``).
Without it: the eigenvectors of the graph (Ng, Jordan and Weiss, "On Spectral Clustering", 2001),
balanced k-means of these, and swaps of two nodes for as long as they lower the cut (after
Kernighan and Lin, 1970).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np
from scipy.linalg import eigh

from moee_analysis.baselines.common.balanced_kmeans import balanced_kmeans
from moee_analysis.errors import MoeeError

Method = Literal["metis", "spectral"]
METHODS: tuple[Method, ...] = ("metis", "spectral")
HEAVIEST = 2**30  # sum of the edges' weights; METIS counts in 32 bits


def best_method() -> Method:
    """``metis`` where it is installed, else ``spectral``."""
    return "metis" if find_spec("pymetis") else "spectral"


def partition(
    weights: np.ndarray, parts: int, *, method: Method | None = None, seed: int = 0
) -> np.ndarray:
    """Divide the nodes of a graph into ``parts`` whose sizes differ by one at most.

    Parameters
    ----------
    weights
        Symmetric whole weights of the edges, int64 (nodes, nodes), 0 where there is none; the
        diagonal is ignored.
    method
        None: :func:`best_method`.
    seed
        Of METIS or of the k-means, and of which nodes leave parts that are too large.

    Returns
    -------
    ndarray
        Part of every node, int64 (nodes,).

    Raises
    ------
    MoeeError
        An unknown method, METIS where it is not installed, or more parts than nodes.
    """
    method = best_method() if method is None else method
    _check(len(weights), parts, method)
    weights = weights - np.diag(np.diag(weights))
    if parts == 1 or not weights.any():
        return levelled(np.zeros(len(weights), dtype=np.int64), parts, seed=seed)
    if method == "metis":
        return levelled(_by_metis(weights, parts, seed), parts, seed=seed)
    exact = weights.astype(np.float64)  # for products by BLAS
    return _by_swaps(exact, _by_eigenvectors(exact, parts, seed))


def cut(weights: np.ndarray, part_of: np.ndarray) -> float:
    """Sum of the weights of all edges between different parts."""
    return float(weights[part_of[:, None] != part_of].sum() / 2)


def levelled(part_of: np.ndarray, parts: int, *, seed: int = 0) -> np.ndarray:
    """Move random nodes of parts that are too large to random places in those that are too small.

    Sizes then differ by one at most: the largest parts stay the largest.
    """
    rng, sizes = np.random.default_rng(seed), np.bincount(part_of, minlength=parts)
    wanted = np.full(parts, len(part_of) // parts)
    wanted[np.argsort(-sizes, kind="stable")[: len(part_of) % parts]] += 1
    surplus = [
        rng.choice(np.flatnonzero(part_of == part), sizes[part] - wanted[part], replace=False)
        for part in np.flatnonzero(sizes > wanted)
    ]
    level = part_of.copy()
    if surplus:
        places = np.repeat(np.arange(parts), np.maximum(wanted - sizes, 0))
        level[np.concatenate(surplus)] = rng.permutation(places)
    return level


def _check(nodes: int, parts: int, method: str) -> None:
    if method not in METHODS:
        raise MoeeError(f"a method among {', '.join(METHODS)}", f"'{method}'", "name one of them")
    if method == "metis" and best_method() != "metis":
        raise MoeeError(
            "METIS", "no package pymetis", "pip install pymetis, or choose method='spectral'"
        )
    if not 1 <= parts <= nodes:
        raise MoeeError(f"1 to {nodes} parts of {nodes} nodes", str(parts), "choose fewer")


def _by_metis(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Parts of nearly equal sizes; heavy graphs are scaled down, their lightest edges left out."""
    import pymetis

    weights = weights // (1 + int(weights.sum()) // HEAVIEST)
    nodes, others = weights.nonzero()
    starts = np.searchsorted(nodes, np.arange(len(weights) + 1))
    graph = pymetis.CSRAdjacency(starts.astype(np.int32), others.astype(np.int32))
    options = pymetis.Options(seed=seed)
    found = pymetis.part_graph(
        parts, graph, eweights=weights[nodes, others].astype(np.int32), options=options
    )
    return np.asarray(found.vertex_part, dtype=np.int64)


def _by_eigenvectors(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Balanced k-means of the rows of the largest eigenvectors of D^-1/2 W D^-1/2."""
    scale = 1 / np.sqrt(np.maximum(weights.sum(axis=1), 1))
    last = len(weights) - 1
    _, vectors = eigh(weights * scale[:, None] * scale, subset_by_index=(last + 1 - parts, last))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return balanced_kmeans(vectors / np.maximum(lengths, 1e-12), parts, seed=seed)


def _by_swaps(weights: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """Swap two nodes of different parts for as long as that lowers the cut."""
    part_of, least = part_of.copy(), 1e-12 * weights.sum()  # what is no rounding error
    while True:
        gains = _gains(weights, part_of)
        partners = gains.argmax(axis=1)
        best = gains[np.arange(len(gains)), partners]
        if best.max() <= least:
            return part_of
        touched: set[int] = set()
        for node in np.argsort(-best, kind="stable")[: int((best > least).sum())]:
            pair = [node, partners[node]]
            own = set(part_of[pair].tolist())
            if touched.isdisjoint(own):  # gains are those of parts as they were
                part_of[pair] = part_of[pair[::-1]]
                touched |= own


def _gains(weights: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """How much swapping two nodes lowers the cut, (nodes, nodes); 0 in the same part."""
    to = weights @ np.eye(part_of.max() + 1)[part_of]  # (nodes, parts)
    ahead = (to - np.take_along_axis(to, part_of[:, None], axis=1))[:, part_of]
    gains = ahead + ahead.T - 2 * weights
    gains[part_of[:, None] == part_of] = 0
    return gains
