"""The minimum spanning tree of mutual reachability, on which HDBSCAN rests: exact, canonical.

Borůvka's algorithm (1926) on the mutual reachability of Campello, Moulavi and Sander (2013), as
McInnes and Healy (2017) do it with space trees; here with products of matrices, which many
dimensions do not slow down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.reachability import Reachability, reachability


@dataclass(frozen=True)
class SpanningTree:
    """A spanning tree of n points: ``edges``, int64 (n - 1, 2), between rows, the lightest first.

    ``weights``, float64 (n - 1,), are mutual reachabilities, in the units of the points.
    ``searched`` is how many points had to look for an edge beyond their listed neighbours.
    """

    edges: np.ndarray
    weights: np.ndarray
    searched: int


@dataclass(frozen=True)
class Distinct:
    """The distinct ones of n points, in an order that does not depend on that of their rows.

    ``points`` (u, d). ``rows`` (n,) are those of all points in that order, ``starts`` (u,) the
    places where the rows of each distinct point begin, ``copies`` (u,) how many there are.
    """

    points: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    copies: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray) -> Distinct:
        """Order ``points``, float (n, d), by their bytes: any order of their values will do."""
        points = np.ascontiguousarray(points + points.dtype.type(0))  # 0.0 for -0.0
        rows = np.argsort(_keys(points), kind="stable")
        points = points[rows]
        keys = _keys(points)
        starts = np.flatnonzero(np.append([True], keys[1:] != keys[:-1]))
        return cls(points[starts], rows, starts, np.diff(starts, append=len(rows)))


def _keys(points: np.ndarray) -> np.ndarray:
    """The bytes of every row, as one value that can be compared."""
    return points.view(np.dtype((np.void, points[0].nbytes)))[:, 0]


def spanning_tree(
    points: np.ndarray, min_samples: int, *, device: str = "cpu", block: int | None = None
) -> SpanningTree:
    """Find the minimum spanning tree of the mutual reachability of ``points``, Euclidean.

    Edges of one weight are ordered by the places of their ends among the distinct points, so the
    tree is a function of the points: rows in another order get the same tree, and equal points
    hang on it alike. Its weights are those of hdbscan's ``prims_kdtree``, to the last digits. It
    takes O(n² d) operations, nearly all in products of matrices, and O(n (d + block)) memory.

    Parameters
    ----------
    points
        Float (n, d), at least two. Half precision is computed with as single precision, all that
        is not a float as double.
    min_samples
        Other points within a core distance, as hdbscan counts them; all there are, if fewer.
    device
        Where distances are computed.
    block
        Rows of distances that are held at once; the tree does not depend on it.

    Raises
    ------
    MoeeError
        Fewer than two points, no dimension; NaN, infinity, distances too large or too small to
        be squared; ``min_samples`` below 1.
    """
    return tree_of(*reachable(points, min_samples, device=device, block=block))


def reachable(
    points: np.ndarray, min_samples: int, *, device: str = "cpu", block: int | None = None
) -> tuple[Distinct, Reachability]:
    """Find what :func:`spanning_tree` starts from: distinct points, and neighbours of each."""
    points = _checked(points, min_samples)
    distinct = Distinct.of(points)
    return distinct, reachability(
        torch.from_numpy(distinct.points).to(device),
        distinct.copies,
        min(min_samples, len(points) - 1),
        block=block,
    )


def tree_of(distinct: Distinct, reach: Reachability) -> SpanningTree:
    """Grow the tree of :func:`spanning_tree` from what it starts from."""
    grown = _Growth.of(reach)
    edges, costs = [np.empty((0, 2), np.int64)], [np.empty(0)]
    while grown.group.any():
        edge, cost = grown.cheapest_edges()
        edges.append(edge)
        costs.append(cost)
        grown.join(edge)
    edges, squared = _with_copies(np.concatenate(edges), np.concatenate(costs), distinct, reach)
    return SpanningTree(distinct.rows[edges], np.sqrt(squared), grown.searched)


@dataclass
class _Growth:
    """A forest that grows into the tree: ``group`` (n,) is the component of every point, from 0.

    ``found`` (n,) is where each point last found its cheapest way out of its group, itself if it
    never had to look beyond its list; no other way out that is unknown costs less than ``least``.
    """

    reach: Reachability
    group: np.ndarray
    found: np.ndarray
    least: np.ndarray
    searched: int = 0

    @classmethod
    def of(cls, reach: Reachability) -> _Growth:
        everyone = np.arange(len(reach.core))
        return cls(reach, everyone, everyone.copy(), reach.rest.copy())

    def cheapest_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Cheapest edge out of every component but the largest, (edges, 2), and what it costs."""
        joining = self.group != np.bincount(self.group).argmax()
        target, cost = self._known_ways()
        self._search(joining, target, cost)
        rows = np.flatnonzero(joining)
        edges = np.sort(np.stack([rows, target[rows]], axis=1), axis=1)
        order = np.lexsort((edges[:, 1], edges[:, 0], cost[rows]))
        _, first = np.unique(self.group[rows[order]], return_index=True)
        chosen = order[first]
        edges, once = np.unique(edges[chosen], axis=0, return_index=True)
        return edges, cost[rows[chosen[once]]]

    def join(self, edges: np.ndarray) -> None:
        """Let components that ``edges`` connect be one."""
        count = self.group.max() + 1
        ends = tuple(self.group[edges].T)
        links = coo_array((np.ones(len(edges)), ends), shape=(count, count))
        self.group = connected_components(links, directed=False)[1][self.group]

    def _known_ways(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each point gets out of its group for least, as far as known, and for how much."""
        outside = self.group[self.reach.near] != self.group[:, None]
        first = outside.argmax(axis=1)[:, None]
        target, cost = (
            np.take_along_axis(values, first, axis=1)[:, 0]
            for values in (self.reach.near, self.reach.costs)
        )
        cost[~outside.any(axis=1)] = np.inf
        still = self._still_found()
        target[still], cost[still] = self.found[still], self.least[still]
        return target, cost

    def _still_found(self) -> np.ndarray:
        """Whether the way out that was found last leads out of the group to this day."""
        return self.group[self.found] != self.group

    def _search(self, joining: np.ndarray, target: np.ndarray, cost: np.ndarray) -> None:
        """Improve ``target`` and ``cost`` of ``joining`` points that may beat their component.

        The most promising search first, for what they find excuses others.
        """
        best = np.full(self.group.max() + 1, np.inf)
        np.minimum.at(best, self.group, cost)
        rows = np.flatnonzero(joining & ~self._still_found())
        rows = rows[np.argsort(self.least[rows], kind="stable")]
        while True:
            rows = rows[self.least[rows] <= best[self.group[rows]]]  # as cheap: one of lower id?
            if not len(rows):
                break
            now, rows = np.split(rows, [self.reach.distances.few])
            target[now], cost[now] = self.reach.way_out(now, self.group)
            self.found[now], self.least[now] = target[now], cost[now]
            np.minimum.at(best, self.group[now], cost[now])
            self.searched += len(now)


def _with_copies(
    edges: np.ndarray, squared: np.ndarray, distinct: Distinct, reach: Reachability
) -> tuple[np.ndarray, np.ndarray]:
    """Edges among all points, as places in ``distinct.rows``, by weight and then by place.

    A copy costs its core distance, and hangs on the first point that costs no more: one that its
    original hangs on too, or the original. So all copies come into a cluster together.
    """
    starts, late = distinct.starts, edges[:, 1]
    hook = starts.copy()
    at_core = squared == reach.core[late]
    np.minimum.at(hook, late[at_core], starts[edges[at_core, 0]])
    point = np.repeat(np.arange(len(starts)), distinct.copies)
    copy = np.delete(np.arange(len(point)), starts)
    edges = np.concatenate([starts[edges], np.stack([hook[point[copy]], copy], axis=1)])
    squared = np.concatenate([squared, reach.core[point[copy]]])
    order = np.lexsort((edges[:, 1], edges[:, 0], squared))
    return edges[order], squared[order]


def _checked(points: np.ndarray, min_samples: int) -> np.ndarray:
    points = np.asarray(points)
    if points.ndim != 2 or len(points) < 2 or points.shape[1] < 1:
        raise MoeeError(
            "at least two points (n, d)", f"shape {points.shape}", "take more images or tokens"
        )
    if min_samples < 1:
        raise MoeeError("min_samples of at least 1", str(min_samples), "raise it")
    single = points.dtype in (np.float16, np.float32)
    return points.astype(np.float32 if single else np.float64, copy=False)
