"""Squared distances among points: all bounded by matrix products, the few that matter exact."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from moee_analysis.errors import MoeeError

ROOM = 2**25  # bounds that are held at once
ROWS = 256  # of a block, at least: thinner products are slower
BATCH = 512  # points, or pairs of them, that are in double precision at once
LEAST = 1e-150  # size of what has a square; its inverse is the largest


@dataclass(frozen=True)
class Distances:
    """Squared Euclidean distances among ``points``, float32 or float64 (n, d), n² never held.

    With x a centred point and a its squared length less what rounding can do, the product of the
    rows (-2 x, a, 1) and (x, 1, a) of two points is a bound from below: it exceeds no distance
    that :meth:`exact` returns. ``factors`` (n, d + 2) are the latter rows, scaled by a power of
    two; bounds are in ``unit``s. They are computed in ``block`` (rows, n).
    """

    points: torch.Tensor
    factors: torch.Tensor
    block: torch.Tensor
    unit: float

    @classmethod
    def of(cls, points: torch.Tensor, dtype: torch.dtype = torch.float32) -> Self:
        """Prepare bounds in the precision ``dtype``."""
        count, dim = points.shape
        centre, scale = _frame(points)
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

    @property
    def few(self) -> int:
        """How many rows at once can afford that all their distances matter."""
        return min(ROWS, len(self.block))

    def below(self, rows: torch.Tensor) -> torch.Tensor:
        """Bounds from below of the distances of ``rows`` to all points, (rows, n).

        At most as many rows as ``block`` has; the next call overwrites what this one returns.
        """
        ours, found = self.factors[rows], self.block[: len(rows)]
        left = torch.cat([-2 * ours[:, :-2], ours[:, -1:], ours[:, -2:-1]], dim=1)
        # NumPy's product: PyTorch's may be set to less than single precision (TF32, bfloat16).
        np.matmul(left.numpy(), self.factors.numpy().T, out=found.numpy())
        return found

    def within(
        self, bounds: torch.Tensor, squared: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in ``bounds`` (rows, n), row and point, that do not exceed ``squared`` (rows,).

        No point that is as near is missed: rounding, of the limit too, keeps an order.
        """
        limit = (squared / self.unit).to(bounds.dtype)
        return torch.nonzero(bounds <= limit[:, None], as_tuple=True)

    def exact(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Distances of pairs of points, float64 (pairs,): sums of squared differences in float64.

        A pair has the same distance, bit for bit, in either order and in any company.
        """
        # All batches are of one size, so that the squares of every pair are added up alike.
        places = torch.arange(-(-len(left) // BATCH) * BATCH)
        found = torch.empty(len(places), dtype=torch.float64)
        for part in places.split(BATCH):
            pair = part.clamp(max=len(left) - 1)
            gap = self.points.index_select(0, right[pair]).double()
            gap -= self.points.index_select(0, left[pair])
            found[part] = gap.square_().sum(dim=1)
        return found[: len(left)]


def _frame(points: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A centre of the points, float64, and the power of two that brings them within 1 of it."""
    centre = points.mean(dim=0).double()
    widest = float(torch.maximum(points.amax(dim=0) - centre, centre - points.amin(dim=0)).max())
    if not (widest == 0 or LEAST < widest < 1 / LEAST):
        raise MoeeError(
            f"finite points, {LEAST} to {1 / LEAST} apart", str(widest),
            "check the weights and images for NaN and infinity",
        )  # fmt: skip
    return centre, 2.0 ** -math.frexp(widest)[1]
