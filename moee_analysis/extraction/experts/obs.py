"""Which hidden neurons can go: backward elimination with the least-squares refit built in.

Optimal Brain Surgeon (Hassibi & Stork, 1993) with whole neurons in the place of weights. Neurons
leave one block after the other, always those whose loss can best be made good by refitted output
weights of the others, and each gets as its score what its removal cost.
"""

from __future__ import annotations

import torch

RIDGE = 1e-3
BLOCK = 24  # every step removes one in so many of the neurons that are left
SQUEEZE = 0.7  # once fewer columns are in use, the others are left out: copying takes longest


def elimination_costs(
    covariance: torch.Tensor,
    readout: torch.Tensor,
    *,
    ridge: float = RIDGE,
    block: int = BLOCK,
) -> torch.Tensor:
    """What it costs to remove each neuron, given that all cheaper ones are gone already.

    With P = (C + r I)^-1 and the current readout V, removing neuron j alone and refitting the rest
    raises the squared error of V a by |V_j|^2 / P_jj. Of the neurons left, the cheapest
    1/``block`` (at least one) go at a time; then V_A -= V_B P_BB^-1 P_BA and
    P_AA -= P_AB P_BB^-1 P_BA for those that stay.

    ``covariance`` is C of the hidden activations, (hidden, hidden); ``readout`` is V, the output
    weights in a metric in which errors are plain squares, (outputs, hidden); ``ridge`` is r over
    the mean diagonal of C. In the order of removal the costs, float64 (hidden,), never fall, so
    that keeping the neurons above a threshold is what elimination up to this threshold keeps.
    """
    inverse, readout = _inverse(covariance.double(), ridge), readout.double().clone()
    neuron = alive = torch.arange(len(covariance))  # neuron of each column; columns still in use
    costs = torch.zeros(len(covariance), dtype=torch.float64)
    highest = costs.new_zeros(1)
    while len(alive):
        cost = (readout.square().sum(dim=0) / inverse.diagonal())[alive]
        order = cost.argsort()
        count = max(1, len(alive) // block)
        going, staying = alive[order[:count]], alive[order[count:]].sort().values
        running = torch.cat([highest, cost[order[:count]]]).cummax(dim=0).values
        costs[neuron[going]], highest = running[1:], running[-1:]
        _remove(inverse, readout, going)
        alive = staying
        if len(alive) < SQUEEZE * len(neuron):
            inverse, readout, neuron = inverse[alive][:, alive], readout[:, alive], neuron[alive]
            alive = torch.arange(len(alive))
    return costs


def _inverse(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """(C + r I)^-1; neurons that never vary keep a finite inverse and cost nothing."""
    # the least float32, so that its inverse is still finite in float64
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    ridged = covariance + ridge * scale * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged))


def _remove(inverse: torch.Tensor, readout: torch.Tensor, going: torch.Tensor) -> None:
    """Take neurons out of the inverse covariance, and refit the readout of the others, in place.

    What is left in the columns of those that are gone means nothing.
    """
    across = inverse[going]
    gain = torch.linalg.solve(across[:, going], across)
    readout.addmm_(readout[:, going], gain, alpha=-1)
    inverse.addmm_(across.T, gain, alpha=-1)
