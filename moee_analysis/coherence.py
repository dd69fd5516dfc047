"""How much more the errors of an image's tokens cost together than one by one.

The Fisher metric of one token takes the errors of the others as independent. They are not: in
deep layers the gradients of an image's tokens point the same way, so that errors that agree add
up, and the tokens that matter most err most. What the errors of whole images cost,
E[(sum_t g_t . delta_t)^2] / 2, over what the metric makes of them token by token, is measured
once for every layer, and multiplies the scores of its routed experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.fisher import expert_metrics
from moee_analysis.planning import sampled
from moee_analysis.progress import progress
from moee_analysis.recorded import recorded_layer
from moee_analysis.refit import mean_shift

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.config import ExtractConfig
    from moee_analysis.images import ImageSet
    from moee_analysis.planning import LayerPlan
    from moee_analysis.recorded import Recorded

IMAGES = 400  # enough to show what is a property of the layer
CHUNK = 50  # images at a time


def cohering(
    model: nn.Module,
    images: ImageSet,
    plans: Sequence[LayerPlan],
    kept: Mapping[str, np.ndarray],
    config: ExtractConfig,
    *,
    root: Path,
) -> list[LayerPlan]:
    """Multiply the scores of every layer by its measured coherence.

    ``kept`` are the neurons, bool (experts, hidden) by site name, that a first sizing of the
    ``plans`` keeps: the errors are those of all others. ``images`` and ``root`` are the plans'.
    """
    activations = sampled(model, images, config, root=root)
    found = []
    for plan in progress(plans, label="measuring coherence"):
        if plan.converted and not plan.constant.any():
            layer = recorded_layer(activations, model, plan.site)
            found.append(scaled(plan, coherence(layer, plan, kept[plan.site.name])))
        else:
            found.append(plan)
    return found


def coherence(layer: Recorded, plan: LayerPlan, kept: np.ndarray) -> float:
    """Cost of the errors of whole images over the sum of the costs of their routed tokens.

    The errors are those of a layer whose experts keep ``kept``, bool (experts, hidden), with the
    means of the other neurons made good.

    Returns
    -------
    float
        About 1 where tokens err independently of each other and of how much they matter; 1
        where there is no error, or none that is read.
    """
    metrics = torch.stack(expert_metrics(layer.sample, plan.members, plan.kinds(layer)))
    costs = [_costs(layer, plan, kept, metrics, images) for images in _chosen(layer)]
    together, apart = np.sum(costs, axis=0)
    return float(together / apart) if together > 0 and apart > 0 else 1.0


def _chosen(layer: Recorded) -> list[np.ndarray]:
    """Images to look at, in chunks: from all over the set, which may be sorted by class."""
    count = int(layer.sample.image.max()) + 1
    even = np.unique(np.linspace(0, count - 1, min(count, IMAGES)).round().astype(int))
    return np.array_split(even, -(-len(even) // CHUNK))


def _costs(
    layer: Recorded,
    plan: LayerPlan,
    kept: np.ndarray,
    metrics: torch.Tensor,
    images: np.ndarray,
) -> tuple[float, float]:
    """What the errors of ``images`` cost as wholes, and token by token, in nats."""
    sample = layer.sample
    routed = plan.members >= len(set(plan.prefix))
    rows = np.flatnonzero(np.isin(sample.image, images) & routed)
    errors = _errors(layer, plan, kept, rows)
    weight = torch.from_numpy(sample.weight[rows])
    moved = torch.from_numpy(sample.gradients(rows)).mul_(errors).sum(dim=2) * weight
    of_image = torch.from_numpy(np.searchsorted(images, sample.image[rows]))
    sums = moved.new_zeros(len(moved), len(images)).index_add_(1, of_image, moved)
    together = float(sums.square().mean(dim=0).sum()) / 2
    return together, _one_by_one(errors, weight, metrics, plan.members[rows])


def _errors(layer: Recorded, plan: LayerPlan, kept: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """What the dropped neurons contribute beyond their mean at ``rows``, float32 (rows, dim)."""
    W2 = layer.mlp.fc2.weight.detach().float().cpu()
    mask, means = torch.from_numpy(kept), torch.from_numpy(plan.scores.means).float()
    expert = torch.from_numpy(plan.members[rows])
    hidden = torch.from_numpy(np.asarray(layer.sample.hidden[rows], dtype=np.float32))
    return mean_shift(W2, mask, means)[expert] - (hidden * ~mask[expert]) @ W2.T


def _one_by_one(
    errors: torch.Tensor, weight: torch.Tensor, metrics: torch.Tensor, expert: np.ndarray
) -> float:
    """Sum over tokens of delta^T Q_e delta, with Q_e half the Fisher information."""
    total = 0.0
    for number in np.unique(expert):
        own = torch.from_numpy(expert == number)
        delta = errors[own].double()
        total += float((((delta @ metrics[number]) * delta).sum(dim=1) * weight[own]).sum())
    return total


def scaled(plan: LayerPlan, factor: float) -> LayerPlan:
    """Multiply the scores of the routed experts of a plan by ``factor``."""
    neurons = plan.scores.neurons.copy()
    neurons[len(set(plan.prefix)) :] *= factor
    return replace(
        plan,
        scores=replace(plan.scores, neurons=neurons),
        coherence=factor * plan.coherence,
    )
