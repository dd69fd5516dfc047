"""What stands in for the dropped neurons: nothing, their mean, or a refitted W2.

Of the N_e tokens that an expert e gets, hidden activations have mean mu_e and covariance C_e; its
kept neurons are the diagonal D_e of zeros and ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.cluster.clusters_to_router import Assignment
from moee_analysis.extraction.experts.layer_experts import Kept, LayerExperts
from moee_analysis.extraction.experts.neuron_scores import find_metrics
from moee_analysis.extraction.record.accumulate import TINY, Accumulator, Sums, accumulate
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite
from moee_analysis.moe.layer import Readout
from moee_analysis.utils.progress import progress

RIDGE = 1e-3  # as a share of the mean diagonal of the normal equations


def refit_layers(
    tokens: TokenSource, layers: Sequence[LayerExperts], kept: Kept, *, refit: str
) -> dict[str, Readout]:
    """Return the readouts of converted ``layers`` by site name; none without a ``refit``."""
    if refit == "none":
        return {}
    given = {}
    for layer in layers:
        name, W2 = layer.site.name, layer.site.module(tokens.model).fc2.weight
        means = torch.from_numpy(layer.statistics.means).float()
        given[name] = W2.detach().float().cpu(), torch.from_numpy(kept[name]), means
    if refit == "shift":
        return {name: Readout(shift=mean_shift(*each)) for name, each in given.items()}
    accumulators = [
        RefitAccumulator.of(e, kept[e.site.name], e.site.module(tokens.model)) for e in layers
    ]
    found = accumulate(tokens, accumulators, label="refitting layers")
    solved = progress(found, label="solving for output weights", total=len(layers))
    return {site.name: shared_readout(*given[site.name], sums) for site, sums in solved}


@dataclass(frozen=True)
class RefitAccumulator(Accumulator):
    """The normal equations of one W2 for all experts of a layer.

    Every token brings the deviation of its activations from its expert's mean, whole and without
    the neurons that the expert drops. ``kept``, bool, and ``means`` of hidden activations are
    (experts, hidden); ``weights`` (experts,) are how much the squared error of a token counts.
    """

    site: MlpSite
    assignment: Assignment
    kept: np.ndarray
    means: np.ndarray
    weights: np.ndarray
    gradients: bool = False

    @classmethod
    def of(cls, layer: LayerExperts, kept: np.ndarray, mlp: Mlp) -> Self:
        """Those of a layer whose experts keep ``kept``; errors count by their metric's diagonal."""
        statistics = layer.statistics
        metric = np.array([float(Q.diagonal().mean()) for Q in find_metrics(mlp, statistics)])
        of_image = layer.tokens * statistics.shares * metric
        weights = of_image / np.maximum(statistics.weight, TINY)
        return cls(layer.site, layer.assignment, kept, statistics.means, weights)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of sum_e w_e C_e D_e, ``across``, and sum_e w_e D_e C_e D_e, ``within``."""
        return dict.fromkeys(("across", "within"), (self.site.hidden, self.site.hidden))

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
            of_row = torch.from_numpy(layer.sample.mass(rows)).to(layer.device)
            weighted = own * (weights[expert] * of_row)[:, None]
            sums["across"] += (deviation.T @ weighted).cpu()
            sums["within"] += (own.T @ weighted).cpu()


def mean_shift(weight: torch.Tensor, kept: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Means of what dropped neurons contribute, as in VBP (ICCV 2025): W2 (I - D_e) mu_e."""
    return (mean * ~kept) @ weight.T


def shared_readout(
    weight: torch.Tensor,
    kept: torch.Tensor,
    means: torch.Tensor,
    sums: Sums,
    *,
    ridge: float = RIDGE,
) -> Readout:
    """One W2 for all experts, the least-squares fit of the dense outputs as routed.

    W = W2 (sum_e w_e C_e D_e + r I) (sum_e w_e D_e C_e D_e + r I)^-1, which minimises
    sum_e w_e E_e |W2 (a - mu_e) - W D_e (a - mu_e)|^2 + r |W - W2|^2; shifts make the means equal.
    With one expert this is the refit of OB2C. Where all neurons are kept, or none, W2 stays.

    ``weight`` is W2, (dim, hidden); ``kept`` and ``means`` are (experts, hidden), ``sums`` those of
    a :class:`RefitAccumulator`; ``ridge`` is r over the mean diagonal of the second matrix.
    """
    across, within = sums["across"], sums["within"]
    scale = ridge * within.diagonal().mean()
    fitted = weight.clone()
    if scale > 0 and not kept.all():
        damping = scale * torch.eye(len(within), dtype=within.dtype)
        # Sums of products in float32 are not quite symmetric: without the transposes, W2 would
        # not come back where all neurons are kept.
        targets = (across + damping).T @ weight.double().T
        fitted = torch.linalg.solve((within + damping).T, targets).T.to(weight.dtype)
    shift = means @ weight.T - (means * kept) @ fitted.T
    return Readout(fitted, torch.zeros_like(shift) if kept.all() else shift)
