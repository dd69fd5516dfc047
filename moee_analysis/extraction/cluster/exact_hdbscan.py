"""HDBSCAN's clusters: a spanning tree by products of matrices, hdbscan's own choice of clusters.

Campello, Moulavi and Sander (2013), with Zimek (2015), for the hierarchy and what is selected of
it; McInnes, Healy and Astels (2017) for the library.

The minimum spanning tree of mutual reachability, on which HDBSCAN rests: exact, canonical.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array, coo_matrix
from scipy.sparse.csgraph import connected_components

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.distances import Distances

LISTED = 32  # neighbours of a point, at least
SPARE = 8  # of them beyond those that the core distance needs
TRIED = 64  # points on which single precision is tried
CERTAIN = 0.9  # share of their core distances that it must make certain


@dataclass(frozen=True)
class SpanningTree:
    """A spanning tree of n points: ``edges``, int64 (n - 1, 2), the lightest first.

    They are between places in ``order`` (n,): the rows of the points, in an order that does not
    depend on theirs. ``weights``, float64 (n - 1,), are mutual reachabilities, in the units of the
    points. ``searched`` is how many points had to look for an edge beyond their listed neighbours.
    """

    edges: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    searched: int


@dataclass(frozen=True)
class Neighbours:
    """Mutual reachability among u distinct points, as far as it had to be computed; all squared.

    It is the largest of the distance of two points and of their core distances ``core`` (u,).
    ``near`` (u, k) are the ids of some neighbours of each point, the point itself among them, by
    what it ``costs`` (u, k) to reach them and then by id. All others cost ``rest`` (u,) or more.
    ``order`` (n,) are the rows of all points by distinct point, and ``starts`` (u,) the places in
    it where each begins.
    """

    distances: Distances
    core: np.ndarray
    near: np.ndarray
    costs: np.ndarray
    rest: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def way_out(self, rows: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where it costs least for ``rows`` to leave their ``group`` (u,), and what it costs.

        Of several points that cost the same it is the one of lowest id.
        """
        at, core, group = map(torch.from_numpy, (rows, self.core, group))

        def cost(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.distances.exact(left, right).maximum(core[left]).maximum(core[right])

        bounds = self.distances.below(at)
        torch.maximum(bounds, (core / self.distances.unit).to(bounds), out=bounds)
        bounds.masked_fill_(group[at, None] == group, torch.inf)
        place, other = self.distances.within(bounds, cost(at, bounds.argmin(dim=1)))
        found = cost(at[place], other).numpy()
        order = np.lexsort((other, found, place))
        first = order[_firsts(place.numpy()[order])]
        return other.numpy()[first], found[first]


def spanning_tree(points: np.ndarray, min_samples: int) -> SpanningTree:
    """Find the minimum spanning tree of the mutual reachability of ``points``, float (n, d).

    A core distance reaches ``min_samples`` other points, as hdbscan counts them; all there are, if
    fewer. Edges of one weight are ordered by their ends among the distinct points, so rows in
    another order get the same tree, and equal points hang on it alike. It takes O(n² d)
    operations, nearly all in products of matrices, and O(n d) memory.

    Raises MoeeError: fewer than two points, no dimension; NaN, infinity, distances too large or
    too small to be squared; ``min_samples`` below 1.
    """
    return grow_tree(find_neighbours(points, min_samples))


def find_neighbours(points: np.ndarray, min_samples: int) -> Neighbours:
    """Find the core distances and the nearest neighbours of :func:`spanning_tree`.

    A list is of the neighbours whose bounds are lowest. A core distance is certain if it is below
    the last bound on the list, and found among all points if it is not.
    """
    points = _as_floats(points, min_samples)
    order, starts = _sort_rows(points)
    copies, needed = np.diff(starts, append=len(points)), min(min_samples + 1, len(points))
    distinct = torch.from_numpy(points[order[starts]])
    distances = Distances.of(distinct)
    some = torch.linspace(0, len(distinct) - 1, min(TRIED, len(distinct))).long()
    _, squared, core, reach = _list(distances, some, copies, needed)
    if np.mean(core <= reach) < CERTAIN:  # single precision does not tell neighbours apart
        distances = Distances.of(distinct, torch.float64)
    near, squared, core, reach = _list(distances, torch.arange(len(distinct)), copies, needed)
    for rows in np.split(
        uncertain := np.flatnonzero(core > reach),
        range(distances.few, len(uncertain), distances.few),
    ):
        at = torch.from_numpy(rows)
        place, other = distances.within(distances.below(at), torch.from_numpy(core[rows]))
        exact = distances.exact(at[place], other).numpy()
        core[rows] = _radii(place.numpy(), exact, copies[other], needed)
    costs = np.maximum(np.maximum(squared, core[near]), core[:, None])
    by_cost = np.lexsort((near, costs))
    near, costs = (np.take_along_axis(values, by_cost, axis=1) for values in (near, costs))
    return Neighbours(distances, core, near, costs, np.maximum(core, reach), order, starts)


def grow_tree(neighbours: Neighbours) -> SpanningTree:
    """Grow the tree of :func:`spanning_tree`."""
    forest = _Forest(neighbours)
    edges, costs = [np.empty((0, 2), np.int64)], [np.empty(0)]
    while forest.group.any():
        edge, cost = forest.cheapest_edges()
        edges.append(edge)
        costs.append(cost)
        forest.join(edge)
    edges, squared = _hang_copies(np.concatenate(edges), np.concatenate(costs), neighbours)
    return SpanningTree(edges, np.sqrt(squared), neighbours.order, forest.searches)


class _Forest:
    """A forest that grows into the tree: ``group`` (u,) is the component of every point, from 0.

    The list of a point that was ``searched`` holds what was then its cheapest way out of its
    group; any that is not listed costs ``rest`` or more.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self.neighbours, self.searches = neighbours, 0
        self.group = np.arange(len(neighbours.core))
        self.searched = np.zeros(len(neighbours.core), dtype=bool)
        self.near, self.costs = neighbours.near.copy(), neighbours.costs.copy()
        self.rest = neighbours.rest.copy()

    def cheapest_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Cheapest edge out of every component but the largest, (edges, 2), and what it costs."""
        joining = self.group != np.bincount(self.group).argmax()
        target, cost = self._ways_out(joining)
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
        links = coo_array((np.ones(len(edges)), tuple(self.group[edges].T)), shape=(count, count))
        self.group = connected_components(links, directed=False)[1][self.group]

    def _ways_out(self, joining: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each point gets out of its group for least, and for how much.

        Looked for is only where it can matter: for ``joining`` points that may beat the known ways
        of their component, the most promising first, for what they find excuses others.
        """
        outside = self.group[self.near] != self.group[:, None]
        first, listed = outside.argmax(axis=1)[:, None], outside.any(axis=1)
        target, cost = (np.take_along_axis(v, first, axis=1)[:, 0] for v in (self.near, self.costs))
        cost[~listed] = np.inf
        best = np.full(self.group.max() + 1, np.inf)
        np.minimum.at(best, self.group, cost)
        rows = np.flatnonzero(joining & ~(self.searched & listed))
        rows = rows[np.argsort(self.rest[rows], kind="stable")]
        # One that costs as much as the best may be of lower id.
        while len(rows := rows[self.rest[rows] <= best[self.group[rows]]]):
            now, rows = np.split(rows, [self.neighbours.distances.few])
            target[now], cost[now] = self.neighbours.way_out(now, self.group)
            self.near[now], self.costs[now] = target[now, None], cost[now, None]
            self.rest[now], self.searched[now] = cost[now], True
            np.minimum.at(best, self.group[now], cost[now])
            self.searches += len(now)
        return target, cost


def _hang_copies(
    edges: np.ndarray, squared: np.ndarray, neighbours: Neighbours
) -> tuple[np.ndarray, np.ndarray]:
    """Edges among all points, as places in ``order``, by weight and then by place.

    A copy costs its core distance, and hangs on the first point that costs no more: one that its
    original hangs on too, or the original. So all copies come into a cluster together.
    """
    starts, core, late = neighbours.starts, neighbours.core, edges[:, 1]
    hook = starts.copy()
    at_core = squared == core[late]
    np.minimum.at(hook, late[at_core], starts[edges[at_core, 0]])
    copy = np.delete(np.arange(len(neighbours.order)), starts)
    original = np.searchsorted(starts, copy, side="right") - 1
    edges = np.concatenate([starts[edges], np.stack([hook[original], copy], axis=1)])
    squared = np.concatenate([squared, core[original]])
    order = np.lexsort((edges[:, 1], edges[:, 0], squared))
    return edges[order], squared[order]


def _as_floats(points: np.ndarray, min_samples: int) -> np.ndarray:
    points = np.asarray(points)
    if points.ndim != 2 or len(points) < 2 or points.shape[1] < 1:
        raise MoeeError(
            "at least two points (n, d)", f"shape {points.shape}", "take more images or tokens"
        )
    if min_samples < 1:
        raise MoeeError("min_samples of at least 1", str(min_samples), "raise it")
    dtype = np.float32 if points.dtype in (np.float16, np.float32) else np.float64
    return np.ascontiguousarray(points.astype(dtype) + dtype(0))  # 0.0 for -0.0


def _sort_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the rows by their bytes (any order of values will do); where distinct ones start."""
    keys = points.view(np.dtype((np.void, points[0].nbytes)))[:, 0]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    return order, np.flatnonzero(np.append([True], keys[1:] != keys[:-1]))


def _list(
    distances: Distances, rows: torch.Tensor, copies: np.ndarray, needed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of ``rows`` by their bounds: ids and squared distances (rows, k).

    Then the core distances (rows,) as far as these tell, and how far at least all others are.
    """
    count = min(max(1 + LISTED, needed + SPARE), len(distances.points))
    # The arrays are there before the loop: small ones that are kept would pin what it frees.
    near = np.empty((len(rows), count), dtype=np.int64)
    squared, reach = np.empty(near.shape), np.full(len(rows), np.inf)
    for part in torch.arange(len(rows)).split(len(distances.block)):
        bounds = distances.below(rows[part])
        bounds.scatter_(1, rows[part, None], -torch.inf)  # the point itself is always listed
        lowest, ids = bounds.topk(count, dim=1, largest=False)
        found = distances.exact(rows[part].repeat_interleave(count), ids.flatten())
        near[part], squared[part] = ids, found.view(ids.shape)
        if count < len(distances.points):
            reach[part] = lowest[:, -1].double() * distances.unit
    place = np.repeat(np.arange(len(rows)), count)
    return near, squared, _radii(place, squared.ravel(), copies[near.ravel()], needed), reach


def _radii(place: np.ndarray, squared: np.ndarray, copies: np.ndarray, needed: int) -> np.ndarray:
    """Least of the distances ``squared`` from each place within which ``needed`` points are."""
    order = np.lexsort((squared, place))
    place, copies = place[order], copies[order]
    within = np.cumsum(copies)
    before = (within - copies)[_firsts(place)]
    enough = np.flatnonzero(within - before[place] >= needed)
    return squared[order[enough[_firsts(place[enough])]]]


def _firsts(values: np.ndarray) -> np.ndarray:
    """Where each of the sorted ``values``, not negative, stands for the first time."""
    return np.flatnonzero(np.diff(values, prepend=-1))


FEW = 4  # dimensions up to which space trees are clearly faster
MANY = 20_000  # points beyond which that is many seconds


def hdbscan_labels(
    points: np.ndarray,
    *,
    min_samples: int,
    min_cluster_size: int,
    max_cluster_size: int | None = None,
) -> np.ndarray:
    """Cluster of every row of ``points``, float (n, d), by HDBSCAN; -1 for noise.

    Sizes are numbers of points; errors are those of :func:`spanning_tree`. Labels do not depend on
    the order of the rows, but for very many points of very few dimensions.
    """
    # Seconds of the products / of hdbscan's fastest exact tree, on two cores, for 20,000 tokens:
    # 1.3 / 0.4 in 2 dimensions, 1.1 / 0.9 in 4, 2.0 / 0.8 in 8, after UMAP; for 10,000 of them:
    # 0.65 / 7.4 in 64 dimensions, 2.4 / 110 in 768; for 50,000: 5.5 / 1.1 in 2, 5.3 / 2.2 in 4.
    if len(points) <= MANY or points.shape[1] > FEW:
        return label_tree(
            spanning_tree(points, min_samples),
            min_cluster_size=min_cluster_size,
            max_cluster_size=max_cluster_size,
        )
    from hdbscan import HDBSCAN

    return HDBSCAN(
        min_samples=min_samples,
        min_cluster_size=min_cluster_size,
        max_cluster_size=max_cluster_size or 0,
        approx_min_span_tree=False,
    ).fit_predict(points.astype(np.float64))


def label_tree(
    tree: SpanningTree, *, min_cluster_size: int, max_cluster_size: int | None = None
) -> np.ndarray:
    """Cluster of every point of ``tree``, -1 for noise: one tree serves for many settings."""
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
    distances = coo_matrix((data, (row, column))).tocsr()
    found = HDBSCAN(
        metric="precomputed",
        min_samples=1,
        min_cluster_size=min_cluster_size,
        max_cluster_size=max_cluster_size or 0,
    ).fit_predict(distances)
    labels = np.empty_like(found)
    labels[tree.order] = found
    return labels
