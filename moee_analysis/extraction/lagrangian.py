"""One budget for all layers, experts and neurons: where each kept neuron is worth most.

Every neuron of every expert has a score, the cost of dropping it per token in a unit that all
layers share, and a price. Kept is what minimises cost + lambda * MACs + nu * parameters: a neuron
of an expert must be worth its MACs, and a neuron in the union of a layer's experts must be worth
its parameters. lambda and nu are found by bisection.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moee_analysis.errors import MoeeError

BISECTIONS = 35


@dataclass(frozen=True)
class Candidates:
    """Neurons of one layer that may be kept.

    ``scores`` (experts, hidden): the cost of dropping a neuron for one token of the expert;
    ``tokens`` (experts,): tokens of an image that use the expert; ``macs``: of one neuron for one
    token; ``parameters``: of one stored neuron.
    """

    scores: np.ndarray
    tokens: np.ndarray
    macs: int
    parameters: int

    def worth(self, per_mac: float, per_parameter: float) -> np.ndarray:
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
    layers: Sequence[Candidates], *, macs: float = math.inf, parameters: float = math.inf
) -> list[np.ndarray]:
    """Choose the neurons of all layers within a budget, bool (experts, hidden) for each layer.

    ``macs`` and ``parameters`` are what all kept neurons together may cost per image, and store.
    """
    for name, budget in (("MACs", macs), ("parameters", parameters)):
        if budget < 0:
            raise MoeeError(
                f"a budget of {name} that what stays dense, routers and shifts fit into",
                f"{-budget:.3g} too few",
                "ask for less, convert more layers, or have fewer experts",
            )

    def within_macs(per_parameter: float) -> list[np.ndarray]:
        """The best choice at this price of a parameter that meets the budget of MACs."""
        return _at_lowest_price(
            lambda per_mac: [layer.worth(per_mac, per_parameter) for layer in layers],
            lambda kept: sum(map(Candidates.macs_of, layers, kept)) <= macs,
        )

    return _at_lowest_price(
        within_macs, lambda kept: sum(map(Candidates.parameters_of, layers, kept)) <= parameters
    )


def _at_lowest_price(
    choice: Callable[[float], list[np.ndarray]], fits: Callable[[list[np.ndarray]], bool]
) -> list[np.ndarray]:
    """The choice at about the lowest price at which it fits; a price of zero is tried first.

    Scores span many orders of magnitude, so prices are bisected on a logarithmic scale.
    """
    best = choice(0.0)
    if fits(best):
        return best
    low, high = -60.0, 20.0
    best = choice(math.exp(high))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = choice(math.exp(middle))
        if fits(found):
            high, best = middle, found
        else:
            low = middle
    return best
