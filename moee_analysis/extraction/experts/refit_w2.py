"""A stand-in for the dropped neurons: nothing, their mean, or a refitted W2.

Of the N_e tokens that an expert e gets, hidden activations have mean mu_e and covariance C_e; its
kept neurons are the diagonal D_e of zeros and ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moee_analysis.extraction.cluster.assignment import Assignment
from moee_analysis.extraction.record.accumulate import Accumulator, Sums
from moee_analysis.extraction.record.recorded_tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite
from moee_analysis.moe.layer import Readout

RIDGE = 1e-3  # as a share of the mean diagonal of the normal equations


@dataclass(frozen=True)
class RefitAccumulator(Accumulator):
    """The normal equations of one W2 for all experts of a layer.

    Two products (hidden, hidden), however many experts there are: every token brings the
    deviation of its activations from its expert's mean, once whole and once without the neurons
    that the expert drops.

    Parameters
    ----------
    kept, means
        Of every expert: its neurons, bool, and mean hidden activations, both (experts, hidden).
    weights
        How much a squared error of an expert's outputs counts, for one of its tokens, (experts,).
    """

    site: MlpSite
    assignment: Assignment
    kept: np.ndarray
    means: np.ndarray
    weights: np.ndarray
    gradients: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of sum_e w_e C_e D_e, ``across``, and sum_e w_e D_e C_e D_e, ``within``."""
        square = (self.site.hidden, self.site.hidden)
        return {"across": square, "within": square}

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        kept = torch.from_numpy(self.kept).to(layer.device)
        means = torch.from_numpy(self.means).float().to(layer.device)
        weights = torch.from_numpy(self.weights).float().to(layer.device)
        _, members = self.assignment.of(layer)
        for chunk in layer.chunks():
            rows = chunk[members[chunk] >= 0]
            expert = torch.from_numpy(members[rows]).to(layer.device)
            deviation = layer.hidden(rows) - means[expert]
            own = deviation * kept[expert]
            of_row = torch.from_numpy(layer.sample.weight[rows]).to(layer.device)
            weighted = own * (weights[expert] * of_row)[:, None]
            sums["across"] += (deviation.T @ weighted).cpu()
            sums["within"] += (own.T @ weighted).cpu()

    def compute(self, sums: Sums) -> Sums:
        """The sums themselves."""
        return sums


def mean_shift(weight: torch.Tensor, kept: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What the dropped neurons contribute on average, W2 (I - D_e) mu_e: (experts, dim).

    Variance-based pruning (VBP, ICCV 2025) does this once for all tokens.

    Parameters
    ----------
    weight
        W2, (dim, hidden).
    kept, mean
        bool and float (experts, hidden).
    """
    return (mean * ~kept) @ weight.T


def shared_readout(
    weight: torch.Tensor,
    sums: Sums,
    kept: torch.Tensor,
    means: torch.Tensor,
    *,
    ridge: float = RIDGE,
) -> Readout:
    """One W2 for all experts, the least-squares fit of the dense outputs as routed.

    W = W2 (sum_e w_e C_e D_e + r I) (sum_e w_e D_e C_e D_e + r I)^-1, which minimises
    sum_e w_e E_e |W2 (a - mu_e) - W D_e (a - mu_e)|^2 + r |W - W2|^2; the shifts make the means
    equal: W2 mu_e - W D_e mu_e. With one expert this is the refit of OB2C. Where no neuron is
    dropped, W2 stays.

    Parameters
    ----------
    weight
        W2 of the dense layer, (dim, hidden).
    sums
        Those of a :class:`RefitAccumulator`.
    kept, means
        bool and float (experts, hidden).
    ridge
        r as a share of the mean diagonal of the matrix that is inverted.
    """
    if kept.all():
        return Readout(weight.clone(), weight.new_zeros(len(kept), len(weight)))
    refitted = _solve(weight, sums["across"], sums["within"], ridge)
    return Readout(refitted, means @ weight.T - (means * kept) @ refitted.T)


def _solve(
    weight: torch.Tensor, across: torch.Tensor, within: torch.Tensor, ridge: float
) -> torch.Tensor:
    """W2 (across + r I) (within + r I)^-1; W2 itself where no neuron is kept."""
    scale = ridge * within.diagonal().mean()
    if scale <= 0:
        return weight.clone()
    identity = torch.eye(len(within), dtype=within.dtype)
    normal = within + scale * identity
    # Sums of products in float32 are not quite symmetric: without the transpose of ``normal``, W2
    # would not come back where all neurons are kept.
    fitted = torch.linalg.solve(normal.T, (across + scale * identity).T @ weight.double().T)
    return fitted.T.to(weight.dtype)
