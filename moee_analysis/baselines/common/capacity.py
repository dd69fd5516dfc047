"""How many tokens, or slots, each expert of a layer computes of an image, by a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moee_analysis.errors import MoeeError


def per_expert(tokens: int, experts: int, capacity: float) -> int:
    """Return ``capacity`` x tokens / experts, rounded, at least 1.

    A capacity of 1 is as much work as if every token had one expert.
    """
    return max(1, round(capacity * tokens / experts))


def fill_budget(
    macs_reduction: float,
    costs: Sequence[float],
    tokens: Sequence[int],
    *,
    dense: float,
    fixed: float,
) -> list[int]:
    """Return how many tokens, or slots, every expert of each layer gets, to save so many MACs.

    One by one the layer gets one more whose experts see the smallest share of its tokens, while
    the budget allows.

    Parameters
    ----------
    macs_reduction
        Share of the dense model's MACs to save.
    costs
        MACs of one token, or slot, of every expert of a layer, by layer.
    tokens
        Tokens of an image in each layer, the most that an expert gets.
    dense, fixed
        MACs of one image: of the dense model, and of the other one without its experts.

    Raises
    ------
    MoeeError
        One token, or slot, per expert is too much already.
    """
    counts, left = [1] * len(costs), (1 - macs_reduction) * dense - fixed - sum(costs)
    if left < 0:
        most = math.floor(1000 * (macs_reduction + left / dense)) / 1000
        raise MoeeError(
            f"a MACs reduction of at most {most:.1%}",
            f"{macs_reduction:.1%}", "save less, or have fewer experts or more layers with experts",
        )  # fmt: skip
    while growing := [
        (count / most, layer)
        for layer, (count, most, cost) in enumerate(zip(counts, tokens, costs, strict=True))
        if count < most and cost <= left
    ]:
        _, layer = min(growing)
        counts[layer] += 1
        left -= costs[layer]
    return counts
