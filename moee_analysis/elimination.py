"""Which hidden neurons can go: backward elimination with the least-squares refit built in.

Optimal Brain Surgeon (Hassibi & Stork, 1993) with whole neurons in the place of weights. Neurons
leave one block after the other, always those whose loss can best be made good by refitted output
weights of the others, and each gets as its score what its removal cost.
"""

from __future__ import annotations

import torch

RIDGE = 1e-3
BLOCK = 24  # every step removes one in so many of the neurons that are left


def elimination_costs(
    covariance: torch.Tensor, readout: torch.Tensor, *, ridge: float = RIDGE, block: int = BLOCK
) -> torch.Tensor:
    """What it costs to remove each neuron, given that all cheaper ones are gone already.

    With P = (C + r I)^-1 and the current readout V, removing neuron j alone and refitting the rest
    raises the squared error of V a by |V_j|^2 / P_jj. Of the neurons left, the cheapest
    1/``block`` (at least one) go at a time; then V_A -= V_B P_BB^-1 P_BA and
    P_AA -= P_AB P_BB^-1 P_BA for those that stay.

    Parameters
    ----------
    covariance
        C, covariance of the hidden activations, (hidden, hidden).
    readout
        V, the output weights in a metric in which errors are plain squares, (outputs, hidden).
    ridge
        r as a share of the mean diagonal of C.

    Returns
    -------
    torch.Tensor
        Float64 (hidden,). In the order of removal the costs never fall, so that keeping the
        neurons above a threshold is what elimination up to this threshold keeps.
    """
    inverse, readout = _inverse(covariance.double(), ridge), readout.double()
    alive = torch.arange(len(covariance))
    costs = torch.zeros(len(covariance), dtype=torch.float64)
    highest = costs.new_zeros(1)
    while len(alive):
        cost = readout.square().sum(dim=0) / inverse.diagonal()
        order = cost.argsort()
        count = max(1, len(alive) // block)
        going, staying = order[:count], order[count:].sort().values
        running = torch.cat([highest, cost[going]]).cummax(dim=0).values
        costs[alive[going]], highest = running[1:], running[-1:]
        inverse, readout = _without(inverse, readout, going, staying)
        alive = alive[staying]
    return costs


def _inverse(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """(C + r I)^-1; neurons that never vary keep a finite inverse and cost nothing."""
    # the least float32, so that its inverse is still finite in float64
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    ridged = covariance + ridge * scale * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged))


def _without(
    inverse: torch.Tensor, readout: torch.Tensor, going: torch.Tensor, staying: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse covariance and refitted readout of the neurons that stay."""
    across = inverse[going][:, staying]
    gain = torch.linalg.solve(inverse[going][:, going], across)
    return (
        inverse[staying][:, staying] - across.T @ gain,
        readout[:, staying] - readout[:, going] @ gain,
    )
