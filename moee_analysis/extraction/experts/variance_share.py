"""Which hidden neurons an expert keeps, by a share of its scores.

MoEE (CVPR 2025), phase 2: rank the neurons of a cluster by their intra-cluster variance and keep
the smallest set whose variances add up to p % of the total.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moee_analysis.errors import MoeeError

BISECTIONS = 50


def keep_share(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest entries of each row that hold a ``share`` of its sum, a bool of the same shape.

    The highest scores come first; ties keep the neurons' order.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(scores, order, axis=1), axis=1)
    total = np.maximum(running[:, -1:], np.finfo(float).tiny)
    short = np.sum(running / total < share - 1e-12, axis=1, keepdims=True)
    counts = scores.shape[1] if share >= 1 else short + 1
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, order, np.arange(scores.shape[1]) < counts, axis=1)
    return kept


def share_for_macs(macs: Callable[[float], float], *, dense: float, reduction: float) -> float:
    """Largest share of the scores whose cost stays within the budget, by bisection.

    Parameters
    ----------
    macs
        Cost of the whole model when every expert keeps a share of its scores; must not
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
            "ask for less, or let more layers be converted (see the reasons per layer)",
        )
    if macs(high) <= budget:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= budget else (low, middle)
    return low
