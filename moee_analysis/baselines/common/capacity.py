"""How many tokens, or slots, each expert of a layer computes of an image, by a budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moee_analysis.errors import MoeeError


def per_expert(tokens: int, experts: int, capacity: float) -> int:
    """Return ``capacity`` x tokens / experts, rounded, at least 1.

    A capacity of 1 is as much work as if every token had one expert.
    """
    return max(1, round(capacity * tokens / experts))


@dataclass(frozen=True)
class ExpertCost:
    """What the experts of a layer cost.

    ``each`` are the MACs of one image for one token, or slot, of every expert; ``tokens`` are those
    that an image has, and as many as an expert gets at most.
    """

    each: float
    tokens: int


def saving(
    macs_reduction: float, layers: Sequence[ExpertCost], *, dense: float, fixed: float
) -> list[int]:
    """Return how many tokens, or slots, every expert of each layer gets, to save so many MACs.

    One by one the layer gets one more whose experts see the smallest share of its tokens, while
    the budget allows.

    Parameters
    ----------
    macs_reduction
        Share of the dense model's MACs to save.
    dense, fixed
        MACs of one image: of the dense model, and of the other one without its experts.

    Raises
    ------
    MoeeError
        One token, or slot, per expert is too much already.
    """
    counts = [1] * len(layers)
    left = (1 - macs_reduction) * dense - fixed - sum(layer.each for layer in layers)
    if left < 0:
        most = math.floor(1000 * (macs_reduction + left / dense)) / 1000
        raise MoeeError(
            f"a MACs reduction of at most {most:.1%}",
            f"{macs_reduction:.1%}", "save less, or have fewer experts or more layers with experts",
        )  # fmt: skip
    while growing := [
        (count / layer.tokens, index)
        for index, (count, layer) in enumerate(zip(counts, layers, strict=True))
        if count < layer.tokens and layer.each <= left
    ]:
        _, index = min(growing)
        counts[index] += 1
        left -= layers[index].each
    return counts
