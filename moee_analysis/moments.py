"""Mean and covariance of the hidden activations of one expert's tokens, over chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from moee_analysis.activations import LayerSample

CHUNK = 16384


@dataclass(frozen=True)
class Moments:
    """Weighted mean (hidden,) and covariance (hidden, hidden), float32, of some tokens.

    ``weight`` is the number of tokens that the rows stand for.
    """

    weight: float
    mean: torch.Tensor
    covariance: torch.Tensor


def moments_of(sample: LayerSample, rows: np.ndarray) -> Moments:
    """Mean and covariance of the hidden activations at ``rows`` of a layer's sample.

    Sums run over deviations from the mean of the first chunk, so that float32 loses nothing to a
    large common mean; chunks are added in float64.
    """
    hidden = sample.hidden[:1].shape[1]
    origin = _hidden(sample, rows[:CHUNK]).mean(dim=0) if len(rows) else torch.zeros(hidden)
    first = torch.zeros(hidden, dtype=torch.float64)
    second = torch.zeros(hidden, hidden, dtype=torch.float64)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        deviation = _hidden(sample, part) - origin
        weighted = deviation * torch.from_numpy(sample.weight[part])[:, None]
        first += weighted.sum(dim=0)
        second += weighted.T @ deviation
    weight = float(sample.weight[rows].sum(dtype=np.float64))
    mean = first / max(weight, np.finfo(float).tiny)
    covariance = second / max(weight, np.finfo(float).tiny) - torch.outer(mean, mean)
    return Moments(weight, (origin + mean).float(), covariance.float())


def _hidden(sample: LayerSample, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(sample.hidden[rows], dtype=np.float32))
