"""What stands in for the dropped neurons: nothing, their mean, or a refitted W2.

Of the N_e tokens that an expert e gets, hidden activations have mean mu_e and covariance C_e; its
kept neurons are the diagonal D_e of zeros and ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moee_analysis.layers import Readout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moee_analysis.moments import Moments

REFITS = ("none", "shift", "shared", "each")
RIDGE = 1e-3  # as a share of the mean diagonal of the normal equations


@dataclass(frozen=True)
class Part:
    """One expert as the refit sees it.

    ``kept`` bool (hidden,); ``moments`` of its tokens as routed; ``weight``, how much a squared
    error of its outputs counts, over all of its tokens.
    """

    kept: torch.Tensor
    moments: Moments
    weight: float


def mean_shift(weight: torch.Tensor, kept: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What the dropped neurons contribute on average, W2 (I - D_e) mu_e: (experts, dim).

    Variance-based pruning (VBP, ICCV 2025) does this once for all tokens.

    Parameters
    ----------
    weight
        W2, (dim, hidden).
    kept, mean
        bool and float (experts, hidden).
    """
    return (mean * ~kept) @ weight.T


def shared_readout(weight: torch.Tensor, parts: Iterable[Part], *, ridge: float = RIDGE) -> Readout:
    """One W2 for all experts, the least-squares fit of the dense outputs as routed.

    W = W2 (sum_e w_e C_e D_e + r I) (sum_e w_e D_e C_e D_e + r I)^-1, which minimises
    sum_e w_e E_e |W2 (a - mu_e) - W D_e (a - mu_e)|^2 + r |W - W2|^2; the shifts make the means
    equal: W2 mu_e - W D_e mu_e. With one expert this is the refit of OB2C.

    Parameters
    ----------
    weight
        W2 of the dense layer, (dim, hidden).
    ridge
        r as a share of the mean diagonal of the matrix that is inverted.
    """
    hidden, total = weight.shape[1], 0.0
    across = torch.zeros(hidden, hidden, dtype=torch.float64)
    within = torch.zeros(hidden, hidden, dtype=torch.float64)
    seen = []
    for part in parts:
        masked = part.weight * part.moments.covariance.double() * part.kept
        across += masked
        within += masked * part.kept[:, None]
        seen.append((part.kept, part.moments.mean))
        total += part.weight
    refitted = _solved(weight, across, within, ridge)
    shifts = [mean @ weight.T - (mean * kept) @ refitted.T for kept, mean in seen]
    return Readout(refitted, torch.stack(shifts))


def each_readout(weight: torch.Tensor, parts: Iterable[Part], *, ridge: float = RIDGE) -> Readout:
    """A W2 of its own for every expert: closer than :func:`shared_readout`, and all of it stored.

    W_e = W2 (C_e D_e + r I) (D_e C_e D_e + r I)^-1, shifted as there.
    """
    single = [shared_readout(weight, [part], ridge=ridge) for part in parts]
    return Readout(
        torch.stack([one.weight for one in single]), torch.cat([one.shift for one in single])
    )


def _solved(
    weight: torch.Tensor, across: torch.Tensor, within: torch.Tensor, ridge: float
) -> torch.Tensor:
    """W2 (across + r I) (within + r I)^-1; W2 itself where no neuron is kept."""
    scale = ridge * within.diagonal().mean()
    if scale <= 0:
        return weight.clone()
    identity = torch.eye(len(within), dtype=within.dtype)
    normal = within + scale * identity
    fitted = torch.linalg.solve(normal, (across + scale * identity).T @ weight.double().T)
    return fitted.T.to(weight.dtype)
