"""One budget for all layers, experts and neurons: where each kept neuron is worth most.

Kept is what minimises cost + lambda * MACs + nu * parameters, cost being that of the neurons that
are dropped, in a unit that all layers share: a neuron of an expert must be worth its MACs, one in
the union of a layer's experts its parameters. lambda and nu are found by bisection.
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

    ``scores`` (experts, hidden) are costs of dropping a neuron for one token of the expert; an
    image has ``tokens`` (experts,) of it. ``macs`` (of a token) and ``parameters`` are a neuron's.
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
    """Choose neurons, bool (experts, hidden) by layer, of so many MACs per image and parameters."""
    for name, budget in (("MACs", macs), ("parameters", parameters)):
        if budget < 0:
            expected = f"a budget of {name} that what stays dense, routers and shifts fit into"
            hint = "ask for less, convert more layers, or have fewer experts"
            raise MoeeError(expected, f"{-budget:.3g} too few", hint)

    def within_macs(per_parameter: float) -> list[np.ndarray]:
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
    """The choice at about the lowest price at which it fits; a price of zero is tried first."""
    best = choice(0.0)
    if fits(best):
        return best
    low, high = -60.0, 20.0  # logarithms: scores span many orders of magnitude
    best = choice(math.exp(high))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = choice(math.exp(middle))
        if fits(found):
            high, best = middle, found
        else:
            low = middle
    return best
