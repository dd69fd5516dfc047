"""Which channels, heads or hidden neurons are recycled: the methods of ``JetpackConfig``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moee_analysis.baselines.common.equal_parts import divide_graph

PARTS = 32  # of a graph, as in the released code
SMALLEST = 8  # units of a part, where there are few


@dataclass(frozen=True)
class Units:
    """Units of one kind at one place, of which some are chosen.

    ``worth`` (total,) is their activation, ``together`` (total, total) how often two are active for
    the same token; None where the method needs none. ``seed`` is that of the graph's division.
    """

    total: int
    worth: np.ndarray | None = None
    together: np.ndarray | None = None
    seed: int = 0

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """Parts of the graph whose edges weigh ``together``, as lists of ids.

        The released code takes METIS as well, but leaves out the weights: almost all edges are
        there, and then co-activations decide nothing.
        """
        count = min(PARTS, max(1, self.total // SMALLEST))
        weights = np.rint(self.together).astype(np.int64)
        part_of = divide_graph(weights, count, seed=self.seed)
        return [np.flatnonzero(part_of == part) for part in range(count)]


def draw_units(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units of an expert: ascending ids.

    ``importance`` draws units by their worth, ``graph`` whole parts by how often their units are
    active together, leaving out the last units over.
    """
    if method == "importance":
        return np.sort(draw_order(units.worth, rng)[:size])
    if method == "graph":
        inner = [units.together[np.ix_(part, part)] for part in units.parts]
        weights = np.array([each.sum() - np.trace(each) for each in inner])
        parts = [units.parts[part] for part in draw_order(weights, rng)]
        return np.sort(np.concatenate(parts)[:size])
    return _choose_blindly(method, units.total, size, rng)


def choose_shared(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units that all tokens pass through: ascending ids.

    Where activations decide, those of the highest worth.
    """
    if method in ("importance", "graph"):
        return np.sort(np.argsort(-units.worth, kind="stable")[:size])
    return _choose_blindly(method, units.total, size, rng)


def spaced_evenly(total: int, size: int) -> np.ndarray:
    """``size`` of ``total`` ids, evenly spaced."""
    return np.linspace(0, total - 1, size).round().astype(np.int64)


def draw_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All ids, drawn one by one without replacement, each as likely as its share of the weights.

    Ids without weight come last.
    """
    noise = rng.gumbel(size=len(weights))  # the largest log-weights plus noise: that very order
    nothing = np.full(len(weights), -np.inf)
    keys = np.log(weights, out=nothing, where=weights > 0) + noise
    return np.argsort(-keys, kind="stable")


def _choose_blindly(method: str, total: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if method == "uniform":
        return spaced_evenly(total, size)
    return np.sort(rng.permutation(total)[:size])
