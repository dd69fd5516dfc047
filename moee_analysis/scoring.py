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
    """
    statistics = statistics_of(sample, lambda rows: members[rows], experts=len(kinds))
    W2 = _matrix(mlp.fc2)
    metrics = (
        expert_metrics(sample, members, kinds) if metric == "fisher" else [_plain(W2)] * len(kinds)
    )
    if order == "magnitude":
        neurons = [_matrix(mlp.fc1).norm(dim=1) * W2.norm(dim=0)] * len(kinds)
    elif order == "variance":
        neurons = list(torch.from_numpy(statistics.variance))
    elif order == "weighted":
        variances = torch.from_numpy(statistics.variance)
        neurons = [v * importance(W2, Q) for v, Q in zip(variances, metrics, strict=True)]
    else:
        neurons = [
            elimination_costs(_covariance(sample, members, expert), root(Q) @ W2)
            for expert, Q in enumerate(metrics)
        ]
    weight = np.array([float(Q.diagonal().mean()) for Q in metrics])
    return Scores(torch.stack(neurons).numpy(), statistics.mean_hidden, weight)


def _covariance(sample: LayerSample, members: np.ndarray, expert: int) -> torch.Tensor:
    return moments_of(sample, np.flatnonzero(members == expert)).covariance


def _matrix(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().double().cpu()


def _plain(readout: torch.Tensor) -> torch.Tensor:
    """The metric in which all outputs count alike."""
    return torch.eye(len(readout), dtype=readout.dtype)
