"""Core distances and short lists of neighbours: what every point can reach, and for how much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moee_analysis.extraction.cluster.distances import Distances

LISTED = 32  # neighbours of a point, at least
SPARE = 8  # of them beyond those that the core distance needs
TRIED = 64  # points on which single precision is tried
CERTAIN = 0.9  # share of their core distances that it must make certain


@dataclass(frozen=True)
class Reachability:
    """Mutual reachability among n different points, as far as it had to be computed; all squared.

    It is the largest of the distance of two points and of their core distances ``core`` (n,).
    ``near`` (n, k) are the ids of some neighbours of each point, the point itself among them, by
    what it ``costs`` (n, k) to reach them and then by id. All others cost ``rest`` (n,) or more.
    """

    distances: Distances
    core: np.ndarray
    near: np.ndarray
    costs: np.ndarray
    rest: np.ndarray

    def way_out(self, rows: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where it costs least for ``rows`` to leave their ``group`` (n,), and what it costs.

        Of several points that cost the same it is the one of lowest id.
        """
        distances, device = self.distances, self.distances.points.device
        at, core, group = (torch.from_numpy(v).to(device) for v in (rows, self.core, group))

        def cost(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return distances.exact(left, right).maximum(core[left]).maximum(core[right])

        bounds = distances.below(at)
        torch.maximum(bounds, (core / distances.unit).to(bounds), out=bounds)
        bounds.masked_fill_(group[at, None] == group, torch.inf)
        place, other = distances.within(bounds, cost(at, bounds.argmin(dim=1)))
        found = cost(at[place], other).cpu().numpy()
        place, other = place.cpu().numpy(), other.cpu().numpy()
        order = np.lexsort((other, found, place))
        first = order[_firsts(place[order])]
        return other[first], found[first]


def reachability(
    points: torch.Tensor, copies: np.ndarray, min_samples: int, *, block: int | None = None
) -> Reachability:
    """Find the core distance and the nearest neighbours of different ``points`` (n, d).

    A product of matrices in single precision bounds all distances, and a list is of those whose
    bounds are lowest; its distances are then computed in double precision. A core distance is
    certain if it is below the last bound on the list, and found among all points if it is not.

    Parameters
    ----------
    copies
        How many equal points each one stands for, int (n,).
    min_samples
        So many points besides the point itself are within its core distance.
    block
        Points whose distances to all others are bounded at once.
    """
    count = min(1 + max(LISTED, min_samples + SPARE), len(points))
    distances = _precise_enough(points, copies, min_samples, count=count, block=block)
    near, squared, reach = _nearest(distances, torch.arange(len(points)), count)
    core = _cores(near, squared, copies, min_samples)
    _make_certain(core, np.flatnonzero(core > reach), distances, copies, min_samples)
    costs = np.maximum(np.maximum(squared, core[near]), core[:, None])
    order = np.lexsort((near, costs))
    near, costs = (np.take_along_axis(values, order, axis=1) for values in (near, costs))
    return Reachability(distances, core, near, costs, np.maximum(core, reach))


def _precise_enough(
    points: torch.Tensor, copies: np.ndarray, min_samples: int, *, count: int, block: int | None
) -> Distances:
    """Distances that single precision bounds, if that tells neighbours apart; else double."""
    single = Distances.of(points, block=block)
    some = torch.linspace(0, len(points) - 1, min(TRIED, len(points))).long()
    near, squared, reach = _nearest(single, some, count)
    if np.mean(_cores(near, squared, copies, min_samples) <= reach) >= CERTAIN:
        return single
    return Distances.of(points, dtype=torch.float64, block=block)


def _nearest(
    distances: Distances, rows: torch.Tensor, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and squared distances (rows, count), and how far at least all points are not listed.

    The arrays are there before the loop: small ones that are kept would pin what it frees.
    """
    near = np.empty((len(rows), count), dtype=np.int64)
    squared, reach = np.empty(near.shape), np.full(len(rows), np.inf)
    size = len(distances.block)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        at = rows[part].to(distances.points.device)
        bounds = distances.below(at)
        bounds.scatter_(1, at[:, None], -torch.inf)  # the point itself is always listed
        lowest, ids = bounds.topk(count, dim=1, largest=False)
        found = distances.exact(at.repeat_interleave(count), ids.flatten())
        near[part], squared[part] = ids.cpu().numpy(), found.view(ids.shape).cpu().numpy()
        if count < len(distances):
            reach[part] = lowest[:, -1].double().cpu().numpy() * distances.unit
    return near, squared, reach


def _cores(
    near: np.ndarray, squared: np.ndarray, copies: np.ndarray, min_samples: int
) -> np.ndarray:
    """Core distances (rows,), squared, as far as the listed neighbours (rows, k) tell."""
    place = np.repeat(np.arange(len(near)), near.shape[1])
    return _radii(place, squared.ravel(), copies[near.ravel()], min_samples + 1)


def _make_certain(
    core: np.ndarray,
    rows: np.ndarray,
    distances: Distances,
    copies: np.ndarray,
    min_samples: int,
) -> None:
    """Replace core distances at ``rows``, no less than the true ones, by those among all points."""
    device = distances.points.device
    for part in np.split(rows, range(distances.few, len(rows), distances.few)):
        at = torch.from_numpy(part).to(device)
        upper = torch.from_numpy(core[part]).to(device)
        place, other = distances.within(distances.below(at), upper)
        squared = distances.exact(at[place], other).cpu().numpy()
        place, other = place.cpu().numpy(), other.cpu().numpy()
        core[part] = _radii(place, squared, copies[other], min_samples + 1)


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
