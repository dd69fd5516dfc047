"""The metric in which an error of an MLP's output counts as what it does to the prediction.

For gradients g of ``output_gradients``, Q = E[g g^T] over an
expert's tokens is the Fisher information of its output: an error e of one token costs about
e^T Q e / 2 nats of KL divergence. This takes the errors of the tokens of an image as independent,
as the Kronecker-factored approximation for shared weights does ("expand", Eschenhagen et al.,
arXiv:2311.00636).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.record.recorded_tokens import LayerSample

PRIOR = 500  # tokens' worth of the metric of all experts that each expert's own is mixed with
CHUNK = 16384
DAMPING = 0.2  # share of the mean eigenvalue added to all


def products(sample: LayerSample, rows: np.ndarray) -> torch.Tensor:
    """Sum of g g^T over the tokens that ``rows`` stand for, mean of probes, float64 (dim, dim)."""
    dim = sample.inputs.shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        gradients = torch.from_numpy(sample.gradients(part))
        weighted = gradients * torch.from_numpy(sample.weight[part])[:, None]
        total += weighted.flatten(end_dim=1).T @ gradients.flatten(end_dim=1) / len(gradients)
    return total


def expert_metrics(sums: Mapping[str, torch.Tensor], kinds: np.ndarray) -> torch.Tensor:
    """Damped metric Q of every expert, float64 (experts, dim, dim): an error e costs e^T Q e nats.

    An expert's own is mixed with that of all tokens of the kind it serves, as if these were
    :data:`PRIOR` tokens more. The ``sums`` are :func:`products` of the tokens of each expert,
    ``fisher`` (experts, dim, dim), and of each kind, ``kinds`` (kinds, dim, dim), and the numbers
    of these tokens, ``weight`` and ``of_kinds``; ``kinds`` (experts,) are those that they serve.
    """
    least = torch.finfo(sums["kinds"].dtype).tiny
    priors = sums["kinds"] / sums["of_kinds"].clamp_min(least)[:, None, None]
    mixed = (sums["fisher"] + PRIOR * priors[kinds]) / (sums["weight"] + PRIOR)[:, None, None]
    return damped(mixed) / 2


def damped(metric: torch.Tensor) -> torch.Tensor:
    """``metric`` (..., dim, dim) plus a share of its mean eigenvalue in every direction."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    return metric + DAMPING * mean * torch.eye(metric.shape[-1], dtype=metric.dtype)


def root(metric: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semidefinite matrix, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def input_root(mlp: Mlp, metric: torch.Tensor) -> torch.Tensor:
    """Linear map A (dim, dim) after which distances of inputs are about those of outputs.

    A^T A = W1^T diag(s) W1 with s_j = W2_j^T Q W2_j: the change of output that a change of input
    makes, in the metric Q, if hidden neurons pass on all of it and independently of each other.
    """
    W1, W2 = mlp.fc1.weight.detach().double().cpu(), mlp.fc2.weight.detach().double().cpu()
    return root(W1.T @ (importance(W2, metric)[:, None] * W1))


def importance(readout: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Squared length of each neuron's output weights in a metric, W2_j^T Q W2_j: (hidden,)."""
    return ((metric @ readout) * readout).sum(dim=0)
