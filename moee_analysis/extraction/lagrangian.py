"""One budget for all layers, experts and neurons: where each kept neuron is worth most.

Kept is what minimises cost + lambda * MACs + nu * parameters, cost being that of the neurons that
are dropped, in a unit that all layers share: a neuron of an expert must be worth its MACs, one in
the union of a layer's experts its parameters. lambda and nu are found by bisection.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moee_analysis.errors import MoeeError

BISECTIONS = 35
LOWEST, HIGHEST = -60.0, 20.0  # logarithms of prices: scores span many orders of magnitude


@dataclass(frozen=True)
class Candidates:
    """Neurons of one layer that may be kept.

    ``scores`` (experts, hidden) are costs of dropping a neuron for one token of the expert; an
    image has ``tokens`` (experts,) of it. ``macs`` (of a token) and ``parameters`` are a neuron's;
    in a budget of time, its seconds stand in the place of MACs.
    """

    scores: np.ndarray
    tokens: np.ndarray
    macs: float
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


@dataclass(frozen=True)
class Option:
    """A way to compute a layer, of so many ``fixed`` seconds, and those of the neurons kept.

    Without ``candidates`` all is kept, and nothing lost.
    """

    fixed: float
    candidates: Candidates | None = None

    def kept(self, price: float) -> np.ndarray:
        """Neurons that are worth so much a second, bool (experts, hidden)."""
        return self.candidates.worth(price, 0)

    def at(self, price: float) -> tuple[float, float]:
        """Seconds, and the loss of an image, with the neurons that are worth so much a second."""
        if self.candidates is None:
            return self.fixed, 0.0
        scores, seconds, losses = self._worst_first
        gone = np.searchsorted(scores, price * self.candidates.macs, side="right")
        return self.fixed + float(seconds[-1] - seconds[gone]), float(losses[gone])

    @cached_property
    def _worst_first(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores of all neurons, ascending; seconds saved and losses without so many of them."""
        own = self.candidates
        tokens = np.repeat(own.tokens, own.scores.shape[1])
        order = np.argsort(own.scores, axis=None)
        scores, tokens = own.scores.ravel()[order], tokens[order]
        sums = (np.cumsum([0.0, *values]) for values in (own.macs * tokens, tokens * scores))
        return scores, *sums


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


Layers = Sequence[Sequence[Option]]  # options of each layer


def choose_options(layers: Layers, seconds: float) -> tuple[tuple[int, ...], float]:
    """Choose an option of every layer, and the price at which they take so many seconds in all.

    The options that cost least at one price for all leave seconds over, for a layer changes in one
    step. So they are improved, one layer at a time, each choice at the price at which it fits.

    Raises MoeeError: even the fastest options take longer.
    """

    def cheapest(price: float) -> tuple[int, ...]:
        costs = [[price * e.at(price)[0] + e.at(price)[1] for e in options] for options in layers]
        return tuple(int(np.argmin(each)) for each in costs)

    def fitted(numbers: tuple[int, ...]) -> tuple[float, float]:
        """Loss and price."""
        price = _lowest_price(lambda price: _total(layers, numbers, price)[0] <= seconds)
        time, loss = _total(layers, numbers, price)
        return (loss if time <= seconds else math.inf), price

    dearest = math.exp(HIGHEST)
    least, _ = _total(layers, cheapest(dearest), dearest)
    if least > seconds:
        expected = "a budget of time that what stays dense, and the fastest of layers, fit into"
        found = f"{1e3 * (least - seconds):.3g} ms too few"
        raise MoeeError(expected, found, "ask for less, or convert more layers")
    price = _lowest_price(lambda price: _total(layers, cheapest(price), price)[0] <= seconds)
    chosen, better = None, cheapest(price)
    while chosen != better:
        chosen = better
        better = min([chosen, *_neighbours(layers, chosen)], key=fitted)
    return chosen, fitted(chosen)[1]


def _total(layers: Layers, numbers: Sequence[int], price: float) -> tuple[float, float]:
    """Seconds and loss of the options of these numbers."""
    found = [options[n].at(price) for options, n in zip(layers, numbers, strict=True)]
    return sum(time for time, _ in found), sum(loss for _, loss in found)


def _neighbours(layers: Layers, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Choices that differ in the option of one layer."""
    return [
        (*numbers[:place], other, *numbers[place + 1 :])
        for place, options in enumerate(layers)
        for other in range(len(options))
        if other != numbers[place]
    ]


def _at_lowest_price(
    choice: Callable[[float], list[np.ndarray]], fits: Callable[[list[np.ndarray]], bool]
) -> list[np.ndarray]:
    """The choice at about the lowest price at which it fits."""
    return choice(_lowest_price(lambda price: fits(choice(price))))


def _lowest_price(fits: Callable[[float], bool]) -> float:
    """About the lowest price that fits; a price of zero is tried first."""
    if fits(0.0):
        return 0.0
    low, high = LOWEST, HIGHEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(math.exp(middle)) else (middle, high)
    return math.exp(high)
