"""Per-expert statistics of tokens: counts, means and variances, in one pass over chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moee_analysis.clustering import NOISE

if TYPE_CHECKING:
    from collections.abc import Callable

    from moee_analysis.activations import LayerSample

CHUNK = 8192


@dataclass(frozen=True)
class ExpertStatistics:
    """Weighted sums over the tokens of each expert; adding two is the same as one longer pass.

    ``weight`` (experts,), ``inputs`` (experts, dim), ``hidden`` and ``squares``
    (experts, hidden), all float64.
    """

    weight: np.ndarray
    inputs: np.ndarray
    hidden: np.ndarray
    squares: np.ndarray

    def __add__(self, other: ExpertStatistics) -> ExpertStatistics:
        return ExpertStatistics(
            self.weight + other.weight,
            self.inputs + other.inputs,
            self.hidden + other.hidden,
            self.squares + other.squares,
        )

    @property
    def shares(self) -> np.ndarray:
        """Share of the tokens that each expert gets; sums to 1."""
        return self.weight / self.weight.sum()

    @property
    def mean_input(self) -> np.ndarray:
        """Mean input of each expert's tokens, (experts, dim)."""
        return self.inputs / self._divisor

    @property
    def mean_hidden(self) -> np.ndarray:
        """Mean hidden activations of each expert's tokens, (experts, hidden)."""
        return self.hidden / self._divisor

    @property
    def variance(self) -> np.ndarray:
        """Intra-expert variance of each hidden neuron, (experts, hidden), never negative."""
        return np.maximum(self.squares / self._divisor - self.mean_hidden**2, 0)

    @property
    def _divisor(self) -> np.ndarray:
        return np.maximum(self.weight, np.finfo(float).tiny)[:, None]


def statistics_of(
    sample: LayerSample, assign: Callable[[slice], np.ndarray], *, experts: int
) -> ExpertStatistics:
    """Accumulate the statistics of a layer's sampled tokens.

    ``assign`` gives the expert of each row of a slice; rows assigned to -1 are left out.
    """
    starts = range(0, len(sample), CHUNK)
    parts = [
        _of_chunk(sample, slice(s, min(s + CHUNK, len(sample))), assign, experts) for s in starts
    ]
    return sum(parts[1:], start=parts[0])


def _of_chunk(
    sample: LayerSample,
    rows: slice,
    assign: Callable[[slice], np.ndarray],
    experts: int,
) -> ExpertStatistics:
    expert = assign(rows)
    member = (expert[:, None] == np.arange(experts)) & (expert != NOISE)[:, None]
    weight = (member * sample.weight[rows, None].astype(np.float64)).T
    hidden = sample.hidden[rows].astype(np.float64)
    return ExpertStatistics(
        weight.sum(axis=1),
        weight @ sample.inputs[rows].astype(np.float64),
        weight @ hidden,
        weight @ hidden**2,
    )
