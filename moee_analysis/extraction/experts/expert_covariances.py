"""Covariances of the hidden activations of every expert, some experts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moee_analysis.extraction.cluster.assignment import Assignment, by_expert
from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.record.accumulate import TINY, Accumulator, Sums, accumulate
from moee_analysis.extraction.record.recorded_tokens import RecordedLayer
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.models.loading import MlpSite

CHUNK = 16384


@dataclass(frozen=True)
class CovarianceAccumulator(Accumulator):
    """Products of deviations of the hidden activations of some ``experts`` of a layer.

    ``means`` (all experts, hidden) are subtracted first, so that float32 loses nothing to a large
    common mean.
    """

    site: MlpSite
    assignment: Assignment
    experts: range
    means: np.ndarray
    gradients: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the products (experts, hidden, hidden) and the numbers of tokens (experts,)."""
        count, hidden = len(self.experts), self.site.hidden
        return {"products": (count, hidden, hidden), "weight": (count,)}

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        _, members = self.assignment.of(layer)
        of_expert = by_expert(members, self.assignment.experts)
        for place, expert in enumerate(self.experts):
            mean = torch.from_numpy(self.means[expert]).float().to(layer.device)
            for rows in layer.chunks(of_expert[expert], size=CHUNK):
                deviation = layer.hidden(rows) - mean
                weight = torch.from_numpy(layer.sample.weight[rows]).to(layer.device)
                sums["products"][place] += ((deviation * weight[:, None]).T @ deviation).cpu()
                sums["weight"][place] += weight.sum(dtype=torch.float64)

    def compute(self, sums: Sums) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield every expert and its covariance, float64 (hidden, hidden)."""
        found = zip(self.experts, sums["products"], sums["weight"], strict=True)
        for expert, products, weight in found:
            yield expert, products / weight.clamp_min(TINY)


def expert_covariances(
    tokens: TokenSource, layers: Sequence[LayerExperts], *, label: str
) -> Iterator[tuple[LayerExperts, int, torch.Tensor]]:
    """Yield layer, expert and covariance (hidden, hidden), float64, for all experts in order.

    Only as many covariances are held at once as fit in the memory that the tokens' limits allow.
    """
    accumulators = [
        CovarianceAccumulator(layer.site, layer.assignment, experts, layer.statistics.means)
        for layer in layers
        for experts in _blocks(layer, tokens.limits.memory)
    ]
    by_site = {layer.site: layer for layer in layers}
    for site, covariances in accumulate(tokens, accumulators, label=label):
        for expert, covariance in covariances:
            yield by_site[site], expert, covariance


def _blocks(layer: LayerExperts, memory: float) -> list[range]:
    """Divide the experts of a layer into blocks whose covariances fit in ``memory``."""
    size = max(1, int(memory // (8 * layer.site.hidden**2)))
    experts = layer.assignment.experts
    return [range(start, min(start + size, experts)) for start in range(0, experts, size)]
