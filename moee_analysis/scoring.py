"""What a hidden neuron is worth to an expert: one score for every neuron of every expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.elimination import elimination_costs
from moee_analysis.fisher import expert_metrics, importance, root
from moee_analysis.moments import moments_of
from moee_analysis.statistics import statistics_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timm.layers import Mlp

    from moee_analysis.activations import LayerSample
    from moee_analysis.statistics import ExpertStatistics


@dataclass(frozen=True)
class Scores:
    """What is known of a layer's experts once their tokens are.

    ``neurons`` (experts, hidden): with the orders ``weighted`` and ``obs`` what dropping a neuron
    costs per token, in squared error of the outputs or, in the Fisher metric, about in nats.
    ``means`` (experts, hidden): mean hidden activations. ``weight`` (experts,): how much a squared
    error of an output counts, for one token. All float64.
    """

    neurons: np.ndarray
    means: np.ndarray
    weight: np.ndarray


def score(
    mlp: Mlp,
    sample: LayerSample,
    members: np.ndarray,
    kinds: Sequence[np.ndarray],
    *,
    order: str,
    metric: str,
    among: np.ndarray | None = None,
) -> Scores:
    """Score the neurons of all experts of a layer.

    Parameters
    ----------
    members
        Expert that each row of the sample counts for, -1 for none, int (rows,).
    kinds
        For each expert, the rows of all tokens of the kind it serves: the prior of its metric.
    order
        ``magnitude`` |W1_j| |W2_j|, the same for all experts and without any data;
        ``variance`` of the activation (MoEE); ``weighted``, variance times W2_j^T Q W2_j, what
        dropping the neuron alone adds to the error once its mean is kept (in the Fisher metric
        the diagonal of its information); ``obs``, see
        :func:`~moee_analysis.elimination.elimination_costs`.
    metric
        ``outputs``: Q is the identity; ``fisher``: that of :mod:`moee_analysis.fisher`.
    among
        Neurons that there still are, bool (hidden,), the others score nothing; None: all.
    """
    W2 = _matrix(mlp.fc2)
    metrics = [torch.eye(len(W2), dtype=W2.dtype)] * len(kinds)
    if metric == "fisher":
        metrics = expert_metrics(sample, members, kinds)
    weight = np.array([float(Q.diagonal().mean()) for Q in metrics])
    among = np.ones(W2.shape[1], dtype=bool) if among is None else among
    if order == "obs":
        return Scores(*_eliminated(sample, members, W2, metrics, among), weight)
    statistics = statistics_of(sample, lambda rows: members[rows], experts=len(kinds))
    neurons = _one_by_one(mlp, statistics, metrics, order)
    return Scores(neurons * among, statistics.mean_hidden, weight)


def _one_by_one(
    mlp: Mlp, statistics: ExpertStatistics, metrics: list[torch.Tensor], order: str
) -> np.ndarray:
    """Scores (experts, hidden) that ask of each neuron what it does by itself."""
    W1, W2 = _matrix(mlp.fc1), _matrix(mlp.fc2)
    if order == "magnitude":
        return np.tile((W1.norm(dim=1) * W2.norm(dim=0)).numpy(), (len(metrics), 1))
    if order == "variance":
        return statistics.variance
    return statistics.variance * torch.stack([importance(W2, Q) for Q in metrics]).numpy()


def _eliminated(
    sample: LayerSample,
    members: np.ndarray,
    W2: torch.Tensor,
    metrics: list[torch.Tensor],
    among: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Costs of removal and mean activations, both (experts, hidden), of every expert's neurons."""
    costs, means, left = [], [], torch.from_numpy(among)
    for expert, Q in enumerate(metrics):
        moments = moments_of(sample, np.flatnonzero(members == expert))
        costs.append(elimination_costs(moments.covariance, root(Q) @ W2, among=left))
        means.append(moments.mean.double())
    return torch.stack(costs).numpy(), torch.stack(means).numpy()


def _matrix(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().double().cpu()
