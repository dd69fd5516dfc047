"""Divisions into parts of equal size: of points by k-means, of a graph where few edges are cut.

Graphs, such as that of neurons that are active together, are divided by METIS (Karypis and Kumar,
"A Fast and High Quality Multilevel Scheme for Partitioning Irregular Graphs", 1998) with the
optional package ``pymetis`` (``pip install moee-analysis[graph]``). Without it: eigenvectors of the
graph (Ng, Jordan and Weiss, "On Spectral Clustering", 2001), balanced k-means of these, and swaps
of two nodes for as long as they lower the cut (after Kernighan and Lin, 1970).
"""

from collections.abc import Iterable
from importlib.util import find_spec

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

HEAVIEST = 2**30  # sum of the edges' weights; METIS counts in 32 bits
TOGETHER = 8  # tokens in a row that a count of co-activation looks at


def balanced_kmeans(
    points: np.ndarray, clusters: int, *, rounds: int = 20, seed: int = 0
) -> np.ndarray:
    """Cluster of each of the ``points`` (n, d), int64 (n,); cluster sizes differ by one at most.

    k-means++ starts; then every round assigns all points at the least total squared distance that
    equal sizes allow, and moves the centres to the means. It stops when nothing gets better.
    """
    centres = _draw_centres(points, clusters, np.random.default_rng(seed))
    best, least = np.zeros(len(points), dtype=np.int64), np.inf
    owner = np.sort(np.arange(len(points)) % clusters)  # a column for each point a centre may take
    for _ in range(rounds):
        _, columns = linear_sum_assignment(cdist(points, centres, "sqeuclidean")[:, owner])
        labels = owner[columns]
        centres = cluster_means(points, labels, clusters)
        inertia = float(((points - centres[labels]) ** 2).sum())
        if not inertia < least:
            break
        best, least = labels, inertia
    return best


def cluster_means(points: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """Mean of every cluster's points, (clusters, d)."""
    sums = np.zeros((clusters, points.shape[1]))
    np.add.at(sums, labels, points)
    return sums / np.bincount(labels, minlength=clusters)[:, None]


def _draw_centres(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each point is likelier the farther it is from the centres before it."""
    chosen = [int(rng.integers(len(points)))]
    nearest = cdist(points, points[chosen], "sqeuclidean")[:, 0]
    for _ in range(clusters - 1):
        total = nearest.sum()
        weights = nearest / total if total > 0 else None
        chosen.append(int(rng.choice(len(points), p=weights)))
        nearest = np.minimum(nearest, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
    return points[chosen].astype(np.float64)


def best_method() -> str:
    """``metis`` where it is installed, else ``spectral``."""
    return "metis" if find_spec("pymetis") else "spectral"


def divide_graph(weights: np.ndarray, parts: int, *, seed: int = 0) -> np.ndarray:
    """Part of every node of a graph, int64 (nodes,), by :func:`best_method`; sizes differ by one.

    ``weights`` of the edges are symmetric, int64 (nodes, nodes), 0 where there is none; the
    diagonal is ignored.
    """
    weights = weights - np.diag(np.diag(weights))
    if parts == 1 or not weights.any():
        return level_parts(np.zeros(len(weights), dtype=np.int64), parts, seed=seed)
    if best_method() == "metis":
        return level_parts(_by_metis(weights, parts, seed), parts, seed=seed)
    exact = weights.astype(np.float64)  # for products by BLAS
    return _swap_nodes(exact, _by_eigenvectors(exact, parts, seed))


def level_parts(part_of: np.ndarray, parts: int, *, seed: int = 0) -> np.ndarray:
    """Move random nodes of parts that are too large to random places in parts that are too small.

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


def _by_metis(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Parts of nearly equal sizes; heavy graphs are scaled down, their lightest edges left out."""
    import pymetis

    weights = weights // (1 + int(weights.sum()) // HEAVIEST)
    nodes, others = weights.nonzero()
    starts = np.searchsorted(nodes, np.arange(len(weights) + 1))
    graph = pymetis.CSRAdjacency(starts.astype(np.int32), others.astype(np.int32))
    edges = weights[nodes, others].astype(np.int32)
    found = pymetis.part_graph(parts, graph, eweights=edges, options=pymetis.Options(seed=seed))
    return np.asarray(found.vertex_part, dtype=np.int64)


def _by_eigenvectors(weights: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Balanced k-means of the rows of the largest eigenvectors of D^-1/2 W D^-1/2."""
    scale = 1 / np.sqrt(np.maximum(weights.sum(axis=1), 1))
    last = len(weights) - 1
    _, vectors = eigh(weights * scale[:, None] * scale, subset_by_index=(last + 1 - parts, last))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return balanced_kmeans(vectors / np.maximum(lengths, 1e-12), parts, seed=seed)


def _swap_nodes(weights: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """Swap two nodes of different parts for as long as that lowers the cut."""
    part_of, least = part_of.copy(), 1e-12 * weights.sum()  # gains above rounding errors
    while True:
        to = weights @ np.eye(part_of.max() + 1)[part_of]  # (nodes, parts)
        ahead = (to - np.take_along_axis(to, part_of[:, None], axis=1))[:, part_of]
        gains = ahead + ahead.T - 2 * weights  # by how much a swap lowers the cut
        gains[part_of[:, None] == part_of] = 0
        partners = gains.argmax(axis=1)
        best = gains[np.arange(len(gains)), partners]
        if best.max() <= least:
            return part_of
        touched: set[int] = set()
        for node in np.argsort(-best, kind="stable")[: int((best > least).sum())]:
            pair = [node, partners[node]]
            own = set(part_of[pair].tolist())
            if touched.isdisjoint(own):  # gains were counted before these parts changed
                part_of[pair] = part_of[pair[::-1]]
                touched |= own


@torch.no_grad()
def coactivation(hidden: Iterable[torch.Tensor]) -> torch.Tensor:
    """How often neurons are active together, (neurons, neurons), in blocks ``hidden`` (n, neurons).

    Every 8 tokens in a row add min(1, sum_t a_t a_t^T), with a = max(activation, 0).
    """
    total = None
    for block in hidden:
        if total is None:
            total = block.new_zeros(block.shape[1], block.shape[1])
        for few in block.clamp(min=0).split(TOGETHER):
            total += (few.T @ few).clamp_(max=1)
    return total


def graph_edges(together: torch.Tensor) -> np.ndarray:
    """Weights of the graph's edges, int64 (neurons, neurons): ``together``, rounded down.

    The unit is 0.99 times its lowest decile that is not zero.
    """
    values = together.double().cpu().numpy()
    deciles = np.percentile(values, np.arange(10, 101, 10))
    if not deciles.max() > 0:
        return np.zeros(values.shape, dtype=np.int64)
    weights = np.floor(values / (0.99 * deciles[deciles > 0][0])).astype(np.int64)
    np.fill_diagonal(weights, 0)
    return weights
