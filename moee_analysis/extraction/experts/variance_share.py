"""Which hidden neurons an expert keeps.

MoEE (CVPR 2025), phase 2: rank the neurons of a cluster by their intra-cluster variance and keep
the smallest set whose variances add up to p % of the total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moee_analysis.errors import MoeeError

BISECTIONS = 50


@dataclass(frozen=True)
class Ranking:
    """Neurons of each expert of one layer, the highest score first (the paper's: variance).

    ``order`` (experts, hidden) neuron ids; ``cumulative`` (experts, hidden) share of the
    expert's total score that the neurons up to each place hold.
    """

    order: np.ndarray
    cumulative: np.ndarray

    def sizes(self, variance_kept: float) -> np.ndarray:
        """Neurons each expert keeps, (experts,): the fewest holding ``variance_kept``."""
        hidden = self.order.shape[1]
        if variance_kept >= 1:
            return np.full(len(self.order), hidden)
        short = np.sum(self.cumulative < variance_kept - 1e-12, axis=1)
        return np.minimum(short + 1, hidden)

    def kept(self, variance_kept: float) -> list[np.ndarray]:
        """Sorted ids of the neurons that each expert keeps."""
        sizes = self.sizes(variance_kept)
        return [np.sort(ids[:size]) for ids, size in zip(self.order, sizes, strict=True)]


def rank_neurons(scores: np.ndarray) -> Ranking:
    """Rank neurons by their scores, float (experts, hidden); ties keep the neurons' order."""
    order = np.argsort(-scores, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(scores, order, axis=1), axis=1)
    total = np.maximum(running[:, -1:], np.finfo(float).tiny)
    return Ranking(order, running / total)


def variance_for_macs(macs: Callable[[float], float], *, dense: float, reduction: float) -> float:
    """Largest share of variance whose cost stays within the budget, by bisection.

    Parameters
    ----------
    macs
        Cost of the whole model when every expert keeps a share of its variance; must not
        fall as the share grows.
    dense
        Cost of the dense model.
    reduction
        Share of ``dense`` to save, in (0, 1).

    Raises
    ------
    MoeeError
        Even the smallest experts cost more than the budget.
    """
    budget = (1 - reduction) * dense
    low, high = 0.0, 1.0
    if macs(low) > budget:
        raise MoeeError(
            f"a MACs reduction of {reduction:.1%}",
            f"at most {1 - macs(low) / dense:.1%} with one neuron per expert in the layers "
            "that have clusters",
            "ask for less, keep fewer tokens dense, or let more layers be converted (see the "
            "reasons per layer)",
        )
    if macs(high) <= budget:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= budget else (low, middle)
    return low
