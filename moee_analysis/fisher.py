"""The metric in which an error of an MLP's output counts as what it does to the prediction.

For gradients g of :func:`moee_analysis.sensitivity.output_gradients`, Q = E[g g^T] over an
expert's tokens is the Fisher information of its output: an error e of one token costs about
e^T Q e / 2 nats of KL divergence. This takes the errors of the tokens of an image as independent,
as the Kronecker-factored approximation for shared weights does ("expand", Eschenhagen et al.,
arXiv:2311.00636).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timm.layers import Mlp

    from moee_analysis.activations import LayerSample

PRIOR = 500  # tokens' worth of the metric of all experts that each expert's own is mixed with
CHUNK = 16384
DAMPING = 0.2  # share of the mean eigenvalue added to all


def fisher(
    sample: LayerSample, rows: np.ndarray, prior: torch.Tensor | None = None
) -> torch.Tensor:
    """Q of the tokens at ``rows`` of a sample with gradients, float64 (dim, dim).

    ``prior`` (dim, dim), the metric of a larger group of tokens, is mixed in as if it were that of
    :data:`PRIOR` tokens more.
    """
    total = sum(_products(sample, rows[i : i + CHUNK]) for i in range(0, max(len(rows), 1), CHUNK))
    tokens = float(sample.weight[rows].sum(dtype=np.float64))
    if prior is None:
        return total / max(tokens, np.finfo(float).tiny)
    return (total + PRIOR * prior) / (tokens + PRIOR)


def expert_metrics(
    sample: LayerSample, members: np.ndarray, kinds: Sequence[np.ndarray]
) -> list[torch.Tensor]:
    """Damped metric of every expert, such that an error e costs e^T Q e nats: float64 (dim, dim).

    Parameters
    ----------
    members
        Expert that each row of the sample counts for, -1 for none, int (rows,).
    kinds
        For each expert, the rows of all tokens of the kind it serves: the prior of its metric.
    """
    distinct = {id(rows): rows for rows in kinds}
    priors = {key: fisher(sample, rows) for key, rows in distinct.items()}
    return [
        damped(fisher(sample, np.flatnonzero(members == expert), priors[id(kind)])) / 2
        for expert, kind in enumerate(kinds)
    ]


def _products(sample: LayerSample, rows: np.ndarray) -> torch.Tensor:
    """Sum of g g^T over the tokens that the rows stand for, averaged over the probes."""
    gradients = torch.from_numpy(sample.gradients(rows))
    weighted = gradients * torch.from_numpy(sample.weight[rows])[:, None]
    products = weighted.flatten(end_dim=1).T @ gradients.flatten(end_dim=1)
    return products.double() / len(gradients)


def damped(metric: torch.Tensor) -> torch.Tensor:
    """``metric`` plus a share of its mean eigenvalue in every direction."""
    return metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)


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
