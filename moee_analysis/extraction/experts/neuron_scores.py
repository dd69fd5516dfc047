"""What a hidden neuron is worth to an expert: one score for every neuron of every expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.cluster.assignment import Assignment
from moee_analysis.extraction.experts.expert_covariances import covariances
from moee_analysis.extraction.experts.expert_statistics import ExpertStatistics
from moee_analysis.extraction.experts.obs import elimination_costs
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.fisher import importance, root
from moee_analysis.utils.distributed import all_sum, processes, rank
from moee_analysis.utils.progress import progress


@dataclass(frozen=True)
class Scores:
    """What the neurons of a layer's experts are worth.

    ``neurons`` (experts, hidden): with the orders ``weighted`` and ``obs`` what dropping a neuron
    costs per token, in squared error of the outputs or, in the Fisher metric, about in nats.
    ``weight`` (experts,): how much a squared error of an output counts, for one token. Float64.
    """

    neurons: np.ndarray
    weight: np.ndarray


def score(
    mlp: Mlp,
    known: ExpertStatistics,
    *,
    order: str,
    costs: np.ndarray | None = None,
    among: np.ndarray | None = None,
) -> Scores:
    """Score the neurons of all experts of a layer, of which so much is ``known``.

    Parameters
    ----------
    order
        ``magnitude`` |W1_j| |W2_j|, the same for all experts and without any data;
        ``variance`` of the activation (MoEE); ``weighted``, variance times W2_j^T Q W2_j, what
        dropping the neuron alone adds to the error once its mean is kept (in the Fisher metric
        the diagonal of its information); ``obs``, the ``costs`` of
        :func:`eliminated`, (experts, hidden). Q is the identity where there is no metric.
    among
        Neurons that there still are, bool (hidden,), the others score nothing; None: all.
    """
    neurons = costs if order == "obs" else _one_by_one(mlp, known, order)
    weight = np.array([float(Q.diagonal().mean()) for Q in metrics_of(mlp, known)])
    return Scores(neurons if among is None else neurons * among, weight)


def metric_of(mlp: Mlp, known: ExpertStatistics, expert: int) -> torch.Tensor:
    """The metric Q of an expert's outputs, float64 (dim, dim)."""
    if known.metrics is None:
        return torch.eye(mlp.fc2.out_features, dtype=torch.float64)
    return torch.from_numpy(np.array(known.metrics[expert], dtype=np.float64))


def metrics_of(mlp: Mlp, known: ExpertStatistics) -> Iterator[torch.Tensor]:
    """Yield the metric of every expert's outputs, float64 (dim, dim)."""
    return (metric_of(mlp, known, expert) for expert in range(len(known.routed)))


def _one_by_one(mlp: Mlp, known: ExpertStatistics, order: str) -> np.ndarray:
    """Scores (experts, hidden) that ask of each neuron what it does by itself."""
    W1, W2 = _matrix(mlp.fc1), _matrix(mlp.fc2)
    if order == "magnitude":
        return np.tile((W1.norm(dim=1) * W2.norm(dim=0)).numpy(), (len(known.routed), 1))
    if order == "variance":
        return known.variance
    return known.variance * torch.stack([importance(W2, Q) for Q in metrics_of(mlp, known)]).numpy()


def eliminated(
    calibration: Calibration,
    assignments: Mapping[str, Assignment],
    known: Mapping[str, ExpertStatistics],
    *,
    among: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Costs of removing each neuron of every expert, float64 (experts, hidden), by site name.

    They are those of ``elimination_costs``, ``among`` the neurons
    that there still are, bool (hidden,) by site name; None: all. Several processes share the work.
    """
    mlps = {site.name: site.module(calibration.model) for site in calibration.sites}
    costs = {
        name: torch.zeros(known[name].means.shape, dtype=torch.float64) for name in assignments
    }
    means = {name: known[name].means for name in assignments}
    found = covariances(calibration, assignments, means, label="covariances of neurons")
    experts = sum(len(each) for each in costs.values())
    found = progress(found, label="eliminating neurons", total=experts)
    for number, (name, expert, covariance) in enumerate(found):
        if number % processes() == rank():
            Q = metric_of(mlps[name], known[name], expert)
            left = None if among is None else torch.from_numpy(among[name])
            readout = root(Q) @ _matrix(mlps[name].fc2)
            costs[name][expert] = elimination_costs(covariance, readout, among=left)
    return {name: all_sum(each).numpy() for name, each in costs.items()}


def _matrix(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().double().cpu()
