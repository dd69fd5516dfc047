"""One budget for all layers, experts and neurons: where each kept neuron is worth most.

Every neuron of every expert has a score, what dropping it costs per token in a unit that all
layers share, and a price. Kept is what minimises cost + lambda * MACs + nu * parameters: a neuron
of an expert must be worth its MACs, and a neuron in the union of a layer's experts must be worth
its parameters. lambda and nu are found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moee_analysis.errors import MoeeError

BISECTIONS = 35


@dataclass(frozen=True)
class Offer:
    """What one layer offers for keeping.

    ``scores`` (experts, hidden): what dropping a neuron costs for one token of the expert;
    ``tokens`` (experts,): tokens of an image that use the expert; ``macs``: of one neuron for one
    token; ``parameters``: of one stored neuron.
    """

    scores: np.ndarray
    tokens: np.ndarray
    macs: int
    parameters: int

    def kept(self, per_mac: float, per_parameter: float) -> np.ndarray:
        """Neurons worth their price, bool (experts, hidden)."""
        worth = self.tokens[:, None] * (self.scores - per_mac * self.macs)
        gain = np.maximum(worth, 0).sum(axis=0)
        return (worth > 0) & (gain > per_parameter * self.parameters)

    def macs_of(self, kept: np.ndarray) -> float:
        """MACs of one image in the kept neurons."""
        return float(self.macs * (self.tokens @ kept.sum(axis=1)))

    def parameters_of(self, kept: np.ndarray) -> int:
        """Stored parameters of the kept neurons, each counted once."""
        return int(self.parameters * kept.any(axis=0).sum())


def choose(
    offers: Sequence[Offer], *, macs: float = math.inf, parameters: float = math.inf
) -> list[np.ndarray]:
    """Choose the neurons of all layers within a budget, bool (experts, hidden) for each layer.

    Parameters
    ----------
    macs, parameters
        What all kept neurons together may cost per image, and may store.

    Raises
    ------
    MoeeError
        A negative budget: what cannot be dropped costs more already.
    """
    for name, budget in (("MACs", macs), ("parameters", parameters)):
        if budget < 0:
            raise MoeeError(
                f"a budget of {name} that what stays dense, routers and shifts fit into",
                f"{-budget:.3g} too few",
                "ask for less, convert more layers, or have fewer experts or tokens kept dense",
            )  # fmt: skip

    def within(per_parameter: float) -> list[np.ndarray]:
        """The best choice at this price of a parameter that meets the budget of MACs."""

        def at(per_mac: float) -> list[np.ndarray]:
            return [offer.kept(per_mac, per_parameter) for offer in offers]

        return _cheapest(at, lambda kept: _total(Offer.macs_of, offers, kept) <= macs)

    return _cheapest(within, lambda kept: _total(Offer.parameters_of, offers, kept) <= parameters)


def _cheapest(
    at: Callable[[float], list[np.ndarray]], fits: Callable[[list[np.ndarray]], bool]
) -> list[np.ndarray]:
    """What ``at`` gives for about the lowest price at which it fits; nothing for free fits first.

    Scores span many orders of magnitude, so prices are bisected on a logarithmic scale.
    """
    best = at(0.0)
    if fits(best):
        return best
    low, high = -60.0, 20.0
    best = at(math.exp(high))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = at(math.exp(middle))
        if fits(found):
            high, best = middle, found
        else:
            low = middle
    return best


def _total(
    cost: Callable[[Offer, np.ndarray], float], offers: Sequence[Offer], kept: list[np.ndarray]
) -> float:
    return sum(cost(offer, mask) for offer, mask in zip(offers, kept, strict=True))
