"""The minimum spanning tree of mutual reachability, on which HDBSCAN rests: exact, canonical.

Squared distances are all bounded by matrix products; the few that matter are computed exactly.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moee_analysis.errors import MoeeError

ROOM = 2**25  # bounds that are held at once
ROWS = 256  # of a block, at least (thinner products are slower), or all of whose distances matter
BATCH = 512  # points, or pairs of them, that are in double precision at once
LEAST = 1e-150  # size of what has a square; its inverse is the largest
LISTED = 32  # neighbours of a point, at least
SPARE = 8  # of them beyond those that the core distance needs
TRIED = 64  # points on which single precision is tried
CERTAIN = 0.9  # share of their core distances that it must make certain


@dataclass(frozen=True)
class SpanningTree:
    """A spanning tree of n points: ``edges``, int64 (n - 1, 2), the lightest first.

    They are between places in ``order`` (n,), the rows of the points in an order of their own.
    ``weights``, float64 (n - 1,), are mutual reachabilities. ``searched`` is how many points had to
    look for an edge beyond their listed neighbours.
    """

    edges: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    searched: int


def spanning_tree(points: np.ndarray, min_samples: int) -> SpanningTree:
    """Find the minimum spanning tree of the mutual reachability of ``points``, float (n, d).

    A core distance reaches ``min_samples`` other points, or all there are. Edges of one weight are
    ordered by their ends among the distinct points, so rows in another order get the same tree. It
    takes O(n² d) operations, nearly all in products of matrices, and O(n d) memory.

    Raises MoeeError: NaN, infinity, distances too large or too small to be squared.
    """
    return grow_tree(find_neighbours(points, min_samples))


@dataclass(frozen=True)
class Distances:
    """Squared Euclidean distances among ``points``, float32 or float64 (n, d), n² never held.

    With x a centred point and a its squared length less what rounding can do, the product of the
    rows (-2 x, a, 1) and (x, 1, a) of two points exceeds no distance that :meth:`exact` returns: a
    bound from below. ``factors`` (n, d + 2) are the latter rows, scaled by a power of two; bounds
    are in ``unit``s, and computed in ``block`` (rows, n).
    """

    points: torch.Tensor
    factors: torch.Tensor
    block: torch.Tensor
    unit: float

    @classmethod
    def of(cls, points: torch.Tensor, dtype: torch.dtype = torch.float32) -> Self:
        """Prepare bounds in the precision ``dtype``."""
        count, dim = points.shape
        centre = points.mean(dim=0).double()
        widest = float((torch.stack(points.aminmax(dim=0)) - centre).abs().max())
        if not (widest == 0 or LEAST < widest < 1 / LEAST):
            hint = "check the weights and images for NaN and infinity"
            raise MoeeError(f"finite points, {LEAST} to {1 / LEAST} apart", str(widest), hint)
        scale = 2.0 ** -math.frexp(widest)[1]  # brings all points within 1 of the centre
        # A dot product of m terms is wrong by at most m u times the sum of its absolute terms, u
        # being the unit roundoff (Higham 2002, section 3.1): here by 2 (d + 2) u times the squared
        # lengths of both points. Another 60 u are for the rounding of x and a, and some units of
        # double precision for what is computed there. A finfo's eps is 2 u.
        kind = torch.finfo(dtype)
        relative = (dim + 32) * (kind.eps + 2 * torch.finfo(torch.float64).eps)
        factors = torch.ones(count, dim + 2, dtype=dtype)
        for part in torch.arange(count).split(BATCH):
            centred = (points[part] - centre) * scale
            factors[part, :dim] = centred.to(dtype)
            lengths = centred.square().sum(dim=1) * (1 - relative / (1 - relative))
            factors[part, -1] = (lengths - 16 * (dim + 32) * kind.tiny).to(dtype)  # underflow
        block = factors.new_empty(min(count, max(ROWS, ROOM // count)), count)
        return cls(points, factors, block, scale**-2)

    def below(self, rows: torch.Tensor) -> torch.Tensor:
        """Bounds of the distances of few ``rows`` to all points, (rows, n), until the next call."""
        ours, found = self.factors[rows], self.block[: len(rows)]
        left = torch.cat([-2 * ours[:, :-2], ours[:, -1:], ours[:, -2:-1]], dim=1)
        # NumPy's product: PyTorch's may be set to less than single precision (TF32, bfloat16).
        np.matmul(left.numpy(), self.factors.numpy().T, out=found.numpy())
        return found

    def within(
        self, bounds: torch.Tensor, squared: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in ``bounds`` (rows, n), row and point, that do not exceed ``squared`` (rows,)."""
        limit = (squared / self.unit).to(bounds.dtype)  # rounded, it keeps an order: none is missed
        return torch.nonzero(bounds <= limit[:, None], as_tuple=True)

    def exact(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Distances of pairs of points, float64 (pairs,), to the same bits in any order."""
        # All batches are of one size, so that the squares of every pair are added up alike.
        places = torch.arange(-(-len(left) // BATCH) * BATCH)
        found = torch.empty(len(places), dtype=torch.float64)
        for part in places.split(BATCH):
            pair = part.clamp(max=len(left) - 1)
            gap = self.points.index_select(0, right[pair]).double()
            gap -= self.points.index_select(0, left[pair])
            found[part] = gap.square_().sum(dim=1)
        return found[: len(left)]


@dataclass
class Forest:
    """Distinct points u whose components grow into one tree by mutual reachability, all squared.

    That is the largest of the distance of two points and of their core distances ``core`` (u,).
    ``near`` (u, k) are the ids of some neighbours of each point, itself among them, by what it
    ``costs`` (u, k) to reach them and then by id; all others cost ``rest`` (u,) or more. ``order``
    (n,) are the rows of all points by distinct point, which begin at ``starts`` (u,). ``group``
    (u,) is the component of every point. One that was ``searched`` lists its way out of it alone.
    """

    distances: Distances
    core: np.ndarray
    near: np.ndarray
    costs: np.ndarray
    rest: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def __post_init__(self) -> None:
        self.group = np.arange(len(self.core))
        self.searched = np.zeros(len(self.core), dtype=bool)
        self.searches = 0

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
        """Where each point gets out of its group for least, and for how much."""
        outside = self.group[self.near] != self.group[:, None]
        first, listed = outside.argmax(axis=1)[:, None], outside.any(axis=1)
        target, cost = (np.take_along_axis(v, first, axis=1)[:, 0] for v in (self.near, self.costs))
        cost[~listed] = np.inf
        best = np.full(self.group.max() + 1, np.inf)
        np.minimum.at(best, self.group, cost)
        # Points look if they may beat the known ways: the most promising first excuse others.
        rows = np.flatnonzero(joining & ~(self.searched & listed))
        rows = rows[np.argsort(self.rest[rows], kind="stable")]
        # One that costs as much as the best may be of lower id.
        while len(rows := rows[self.rest[rows] <= best[self.group[rows]]]):
            now, rows = np.split(rows, [ROWS])
            target[now], cost[now] = self._search(now)
            self.near[now], self.costs[now] = target[now, None], cost[now, None]
            self.rest[now], self.searched[now] = cost[now], True
            np.minimum.at(best, self.group[now], cost[now])
            self.searches += len(now)
        return target, cost

    def _search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where it costs least for ``rows`` to leave their group (the lowest id), and the cost."""
        at, core, group = map(torch.from_numpy, (rows, self.core, self.group))

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


def find_neighbours(points: np.ndarray, min_samples: int) -> Forest:
    """Find the core distances and the nearest neighbours of :func:`spanning_tree`."""
    dtype = np.float32 if points.dtype in (np.float16, np.float32) else np.float64
    points = np.ascontiguousarray(points.astype(dtype) + dtype(0))  # 0.0 for -0.0
    keys = points.view(np.dtype((np.void, points[0].nbytes)))[:, 0]  # any order of values will do
    _, point, copies = np.unique(keys, return_inverse=True, return_counts=True)
    order, starts = np.argsort(point, kind="stable"), np.cumsum(copies) - copies
    distinct, needed = torch.from_numpy(points[order[starts]]), min(min_samples + 1, len(points))
    distances = Distances.of(distinct)
    some = torch.linspace(0, len(distinct) - 1, min(TRIED, len(distinct))).long()
    _, squared, core, reach = _list(distances, some, copies, needed)
    if np.mean(core <= reach) < CERTAIN:  # single precision does not tell neighbours apart
        distances = Distances.of(distinct, torch.float64)
    near, squared, core, reach = _list(distances, torch.arange(len(distinct)), copies, needed)
    # What is not below the last bound on its list is found among all points.
    for at in torch.from_numpy(np.flatnonzero(core > reach)).split(ROWS):
        rows = at.numpy()
        place, other = distances.within(distances.below(at), torch.from_numpy(core[rows]))
        exact = distances.exact(at[place], other).numpy()
        core[rows] = _radii(place.numpy(), exact, copies[other], needed)
    costs = np.maximum(np.maximum(squared, core[near]), core[:, None])
    by_cost = np.lexsort((near, costs))
    near, costs = (np.take_along_axis(values, by_cost, axis=1) for values in (near, costs))
    return Forest(distances, core, near, costs, np.maximum(core, reach), order, starts)


def grow_tree(forest: Forest) -> SpanningTree:
    """Grow the tree of :func:`spanning_tree` (Borůvka): all components but one join at a time."""
    edges, costs = [np.empty((0, 2), np.int64)], [np.empty(0)]
    while forest.group.any():
        edge, cost = forest.cheapest_edges()
        edges.append(edge)
        costs.append(cost)
        forest.join(edge)
    edges, squared = np.concatenate(edges), np.concatenate(costs)
    # A copy costs its core distance, and hangs on the first point that costs no more: one that its
    # original hangs on too, or the original. So all copies come into a cluster together.
    starts, core, late = forest.starts, forest.core, edges[:, 1]
    hook = starts.copy()
    at_core = squared == core[late]
    np.minimum.at(hook, late[at_core], starts[edges[at_core, 0]])
    copy = np.delete(np.arange(len(forest.order)), starts)
    original = np.searchsorted(starts, copy, side="right") - 1
    edges = np.concatenate([starts[edges], np.stack([hook[original], copy], axis=1)])
    squared = np.concatenate([squared, core[original]])
    order = np.lexsort((edges[:, 1], edges[:, 0], squared))
    return SpanningTree(edges[order], np.sqrt(squared[order]), forest.order, forest.searches)


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
