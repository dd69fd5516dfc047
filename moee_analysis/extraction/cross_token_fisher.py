"""How much more the errors of an image's tokens cost together than one by one.

The Fisher metric of one token takes the errors of the others as independent. They are not: in
deep layers the gradients of an image's tokens point the same way, so that errors that agree add
up, and the tokens that matter most err most. What the errors of whole images cost,
E[(sum_t g_t . delta_t)^2] / 2, over what the metric makes of them token by token, is measured
once for every layer, and multiplies the scores of its routed experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moee_analysis.extraction.cluster.assignment import Assignment, by_expert
from moee_analysis.extraction.experts.expert_statistics import ExpertStatistics
from moee_analysis.extraction.experts.neuron_scores import metrics_of
from moee_analysis.extraction.experts.refit_w2 import mean_shift
from moee_analysis.extraction.plan import LayerPlan
from moee_analysis.extraction.record.accumulate import Sums, summed
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.layer_tokens import Recorded
from moee_analysis.models.loading import MlpSite

IMAGES = 400  # enough to show what is a property of the layer
CHUNK = 50  # images at a time


def cohering(
    calibration: Calibration, plans: Sequence[LayerPlan], kept: Mapping[str, np.ndarray]
) -> list[LayerPlan]:
    """Multiply the scores of every layer by its measured coherence.

    ``kept`` are the neurons, bool (experts, hidden) by site name, that a first sizing of the
    ``plans`` keeps: the errors are those of all others.
    """
    images = looked_at(len(calibration.images))
    some = replace(calibration, looked_at=tuple(images.tolist()))
    tallies = [
        CoherenceTally(plan.site, plan.assignment, plan.known, kept[plan.site.name], images)
        for plan in plans
        if plan.converted and not plan.unread
    ]
    found = {
        tally.site.name: coherence(sums)
        for tally, sums in summed(some, tallies, label="measuring coherence")
    }
    return [
        scaled(plan, found[plan.site.name]) if plan.site.name in found else plan for plan in plans
    ]


def looked_at(images: int) -> np.ndarray:
    """Numbers of the images that are looked at: from all over the set, which may be sorted."""
    return np.unique(np.linspace(0, images - 1, min(images, IMAGES)).round().astype(int))


@dataclass(frozen=True)
class CoherenceTally:
    """Adds up what the errors of whole images cost, and what they cost token by token.

    The errors are those of a layer whose experts keep ``kept``, bool (experts, hidden), with the
    means of the other neurons made good. Only the routed tokens of ``images`` count.
    """

    site: MlpSite
    assignment: Assignment
    known: ExpertStatistics
    kept: np.ndarray
    images: np.ndarray
    gradients: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of two sums, in nats."""
        return {"together": (), "apart": ()}

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the sums."""
        kept = hashlib.sha256(self.kept.tobytes()).hexdigest()
        return {"experts": self.assignment.digest, "kept": kept, "images": self.images.tolist()}

    def add(self, sums: Sums, layer: Recorded) -> None:
        """Add a part of the tokens."""
        seen = layer.sample.image
        images = self.images[(self.images >= seen.min()) & (self.images <= seen.max())]
        if len(images) == 0:
            return
        _, members = self.assignment.of(layer)
        metrics = torch.stack(list(metrics_of(layer.mlp, self.known))).float()
        for few in np.array_split(images, -(-len(images) // CHUNK)):
            counted = np.isin(seen, few) & (members >= self.assignment.leading)
            rows = np.flatnonzero(counted)
            errors = self._errors(layer, rows, members[rows])
            sums["together"] += _together(layer, rows, errors, few)
            weight = torch.from_numpy(layer.sample.weight[rows])
            sums["apart"] += _one_by_one(errors, weight, metrics, members[rows])

    def _errors(self, layer: Recorded, rows: np.ndarray, members: np.ndarray) -> torch.Tensor:
        """What the dropped neurons contribute beyond their mean at ``rows``, float32 (n, dim)."""
        W2 = layer.mlp.fc2.weight.detach().float().cpu()
        mask, means = torch.from_numpy(self.kept), torch.from_numpy(self.known.means).float()
        expert = torch.from_numpy(members)
        hidden = torch.from_numpy(np.asarray(layer.sample.hidden[rows], dtype=np.float32))
        return mean_shift(W2, mask, means)[expert] - (hidden * ~mask[expert]) @ W2.T


def coherence(sums: Sums) -> float:
    """Cost of the errors of whole images over the sum of the costs of their routed tokens.

    About 1 where tokens err independently of each other and of how much they matter; 1 where
    there is no error, or none that is read.
    """
    together, apart = float(sums["together"]), float(sums["apart"])
    return together / apart if together > 0 and apart > 0 else 1.0


def _together(layer: Recorded, rows: np.ndarray, errors: torch.Tensor, images: np.ndarray) -> float:
    """What the ``errors`` at ``rows`` cost as those of whole ``images``, in nats."""
    sample = layer.sample
    weight = torch.from_numpy(sample.weight[rows])
    moved = torch.from_numpy(sample.gradients(rows)).mul_(errors).sum(dim=2) * weight
    of_image = torch.from_numpy(np.searchsorted(images, sample.image[rows]))
    sums = moved.new_zeros(len(moved), len(images)).index_add_(1, of_image, moved)
    return float(sums.square().mean(dim=0).sum()) / 2


def _one_by_one(
    errors: torch.Tensor, weight: torch.Tensor, metrics: torch.Tensor, expert: np.ndarray
) -> float:
    """Sum over tokens of delta^T Q_e delta, with Q_e half the Fisher information."""
    total = 0.0
    for number, own in enumerate(by_expert(expert, len(metrics))):
        delta = errors[own]
        cost = ((delta @ metrics[number]) * delta).sum(dim=1, dtype=torch.float64)
        total += float(cost @ weight[own].double())
    return total


def scaled(plan: LayerPlan, factor: float) -> LayerPlan:
    """Multiply the scores of the routed experts of a plan by ``factor``."""
    neurons = plan.scores.neurons.copy()
    neurons[plan.assignment.leading :] *= factor
    return replace(
        plan,
        scores=replace(plan.scores, neurons=neurons),
        coherence=factor * plan.coherence,
    )
