"""Covariances of the hidden activations of every expert, some experts at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moee_analysis.extraction.cluster.assignment import Assignment, by_expert
from moee_analysis.extraction.record.accumulate import Sums, summed
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.layer_tokens import Recorded
from moee_analysis.models.loading import MlpSite

CHUNK = 16384


@dataclass(frozen=True)
class MomentTally:
    """Adds up products of deviations of the hidden activations of some ``experts`` of a layer.

    ``means`` (all experts, hidden) are what they deviate from, so that float32 loses nothing to
    a large common mean.
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

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the sums."""
        means = hashlib.sha256(np.ascontiguousarray(self.means).tobytes()).hexdigest()
        experts = [self.experts.start, self.experts.stop]
        return {"experts": self.assignment.digest, "moments": experts, "means": means}

    def add(self, sums: Sums, layer: Recorded) -> None:
        """Add a part of the tokens."""
        _, members = self.assignment.of(layer)
        of_expert = by_expert(members, self.assignment.experts)
        for place, expert in enumerate(self.experts):
            mean = torch.from_numpy(self.means[expert]).float().to(layer.device)
            for start in range(0, len(of_expert[expert]), CHUNK):
                rows = of_expert[expert][start : start + CHUNK]
                hidden = np.asarray(layer.sample.hidden[rows], dtype=np.float32)
                deviation = torch.from_numpy(hidden).to(layer.device) - mean
                weight = torch.from_numpy(layer.sample.weight[rows]).to(layer.device)
                sums["products"][place] += ((deviation * weight[:, None]).T @ deviation).cpu()
                sums["weight"][place] += weight.sum(dtype=torch.float64)


def covariances(
    calibration: Calibration,
    assignments: Mapping[str, Assignment],
    means: Mapping[str, np.ndarray],
    *,
    label: str,
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield site name, expert and covariance (hidden, hidden), float64, for all experts.

    ``means`` are those of the experts' hidden activations, (experts, hidden) by site name. Only
    as many covariances are held at once as fit in the calibration's memory.
    """
    tallies = [
        MomentTally(site, assignments[site.name], experts, means[site.name])
        for site in calibration.sites
        if site.name in assignments
        for experts in _blocks(site, assignments[site.name].experts, calibration.limits.memory)
    ]
    for tally, sums in summed(calibration, tallies, label=label):
        least = torch.finfo(torch.float64).tiny
        for place, expert in enumerate(tally.experts):
            weight = sums["weight"][place].clamp_min(least)
            yield tally.site.name, expert, sums["products"][place] / weight


def _blocks(site: MlpSite, experts: int, memory: float) -> list[range]:
    """Divide the experts of a layer into blocks whose covariances fit in ``memory``."""
    size = max(1, int(memory // (8 * site.hidden**2)))
    return [range(start, min(start + size, experts)) for start in range(0, experts, size)]
