"""Which neurons are active together: the graph that MoEfication divides into experts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

TOGETHER = 8  # tokens in a row that a count looks at


@torch.no_grad()
def coactivation(hidden: Iterable[torch.Tensor]) -> torch.Tensor:
    """How often neurons are active together, (neurons, neurons).

    Every 8 tokens in a row add min(1, sum_t a_t a_t^T), with a = max(activation, 0), which is
    ReLU's own activation. ``hidden`` are activations (n, neurons) of some tokens after others.
    """
    total = None
    for block in hidden:
        if total is None:
            total = block.new_zeros(block.shape[1], block.shape[1])
        for few in block.clamp(min=0).split(TOGETHER):
            total += (few.T @ few).clamp_(max=1)
    return total


def edges(together: torch.Tensor) -> np.ndarray:
    """Whole weights of the graph's edges, int64 (neurons, neurons), 0 where there is none.

    In units of 0.99 times the lowest decile of ``together`` that is not zero; what is below one is
    no edge.
    """
    values = together.double().cpu().numpy()
    deciles = np.percentile(values, np.arange(10, 101, 10))
    if not deciles.max() > 0:
        return np.zeros(values.shape, dtype=np.int64)
    weights = np.floor(values / (0.99 * deciles[deciles > 0][0])).astype(np.int64)
    np.fill_diagonal(weights, 0)
    return weights
