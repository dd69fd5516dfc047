"""How units are chosen: the methods of checkpoint recycling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moee_analysis.baselines.jetpack.graph_selection import drawn_order, drawn_parts


@dataclass(frozen=True)
class Units:
    """Units of one kind at one place, of which some are chosen.

    ``worth`` (total,) is what they are worth, ``together`` (total, total) how often they are active
    at once, ``parts`` how their graph is cut; None where the method needs none.
    """

    total: int
    worth: np.ndarray | None = None
    together: np.ndarray | None = None
    parts: list[np.ndarray] | None = None


def drawn(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units of an expert by a method of ``JetpackConfig``: ascending ids."""
    if method == "importance":
        return np.sort(drawn_order(units.worth, rng)[:size])
    if method == "graph":
        return drawn_parts(units.parts, units.together, size, rng)
    return _blind(method, units.total, size, rng)


def shared(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units of what all tokens pass through: ascending ids.

    Where activations decide, those that are worth most.
    """
    if method in ("importance", "graph"):
        return np.sort(np.argsort(-units.worth, kind="stable")[:size])
    return _blind(method, units.total, size, rng)


def evenly(total: int, size: int) -> np.ndarray:
    """``size`` of ``total`` ids, evenly spaced."""
    return np.linspace(0, total - 1, size).round().astype(np.int64)


def _blind(method: str, total: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if method == "uniform":
        return evenly(total, size)
    return np.sort(rng.permutation(total)[:size])
