"""A layer whose groups of tokens, and the neurons that vary in each, are known."""

from __future__ import annotations

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.activations import LayerSample
from moee_analysis.clustering import NOISE
from moee_analysis.models import MlpSite
from moee_analysis.recorded import Recorded

DIM, HIDDEN = 4, 6
SITE = MlpSite("blocks.0.mlp", 0, DIM, HIDDEN)
NORTH, EAST, UP = np.eye(DIM)[:3]


def planted(*groups, spread=0.05, seed=0, images=1):
    """A layer with tokens around directions: (direction, count, neuron that varies there).

    The tokens are dealt to so many images, each group as a whole after the last.
    """
    rng = np.random.default_rng(seed)
    inputs, hidden = [], []
    for direction, count, neuron in groups:
        inputs.append(direction + spread * rng.normal(size=(count, DIM)))
        quiet = 0.01 * rng.normal(size=(count, HIDDEN))
        quiet[:, neuron] = rng.normal(size=count)
        hidden.append(quiet)
    total = sum(count for _, count, _ in groups)
    sample = LayerSample(
        np.concatenate(inputs).astype(np.float16),
        np.concatenate(hidden).astype(np.float16),
        np.arange(total, dtype=np.int32) % images,
        np.arange(total, dtype=np.int32) // images,
        np.ones(total, dtype=np.float32),
    )
    torch.manual_seed(seed)
    return Recorded(SITE, Mlp(DIM, HIDDEN).requires_grad_(requires_grad=False), sample, "planted")


# 40 tokens to the north that vary in neuron 0, 20 to the east in neuron 1; and 30 tokens of noise
# near the north whose activations vary in neuron 2.
PLANTED = planted((NORTH, 40, 0), (EAST, 20, 1), (NORTH + 0.2 * UP, 30, 2))
LABELS = np.repeat([0, 1, NOISE], [40, 20, 30])
ROWS = np.arange(90)
