"""Units that are often active together: parts of their graph, and experts drawn from these parts.

Vertices are units, the weight of an edge is how often both are active for the same token.
"""

from __future__ import annotations

import numpy as np

from moee_analysis.baselines.common.graph_partition import partition

PARTS = 32  # of a graph, as in the released code
SMALLEST = 8  # units of a part, where there are few


def parts_of(together: np.ndarray, *, seed: int = 0) -> list[np.ndarray]:
    """Cut the graph whose edges weigh ``together`` (units, units) into parts, as lists of ids.

    The released code takes METIS as well, but leaves out the weights: almost all edges are there,
    and then co-activations decide nothing.
    """
    count = min(PARTS, max(1, len(together) // SMALLEST))
    part_of = partition(np.rint(together).astype(np.int64), count, seed=seed)
    return [np.flatnonzero(part_of == part) for part in range(count)]


def drawn_parts(
    parts: list[np.ndarray], together: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw parts without replacement until there are ``size`` units, and leave out what is over.

    Parts are likelier the more often their units are active together. Returns ascending ids.
    """
    inner = [together[np.ix_(part, part)] for part in parts]
    weights = np.array([each.sum() - np.trace(each) for each in inner])
    return np.sort(np.concatenate([parts[i] for i in drawn_order(weights, rng)])[:size])


def drawn_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All ids, drawn one by one without replacement, each as likely as its share of the weights.

    The largest of log-weights plus Gumbel noise come in that very order. What weighs nothing comes
    last.
    """
    noise = rng.gumbel(size=len(weights))
    nothing = np.full(len(weights), -np.inf)
    keys = np.log(weights, out=nothing, where=weights > 0) + noise
    return np.argsort(-keys, kind="stable")
