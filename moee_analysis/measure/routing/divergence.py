"""How far apart distributions over experts are, in bits."""

from __future__ import annotations

import numpy as np
from scipy.special import entr

from moee_analysis.measure.routing.routes import Routes


def entropy(p: np.ndarray) -> np.ndarray:
    """Shannon entropy of distributions ``p`` (..., experts), in bits."""
    return entr(p).sum(axis=-1) / np.log(2)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of ``p`` and ``q`` (..., experts), in bits: 0 equal, 1 disjoint."""
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)


def image_shares(routes: Routes, layer: int) -> np.ndarray:
    """How the choices of each image's tokens fall on the experts: (images, experts), rows sum to 1.

    With one expert per token this is the expert's share of the image's tokens.
    """
    counts = routes.counts[layer].astype(np.float64)
    return counts / counts.sum(axis=1, keepdims=True)
