"""How much more the errors of an image's tokens cost together than one by one.

The Fisher metric takes the errors of tokens as independent. They are not: in deep layers the
gradients of an image's tokens point the same way, and the tokens that matter most err most. The
cost of the errors of whole images, E[(sum_t g_t . delta_t)^2] / 2, over the sum of the metric's
costs token by token multiplies the scores of a layer's routed experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from moee_analysis.extraction.cluster.clusters_to_router import Assignment, by_expert
from moee_analysis.extraction.experts.layer_experts import ExpertStatistics, LayerExperts
from moee_analysis.extraction.experts.neuron_scores import find_metrics
from moee_analysis.extraction.experts.refit_w2 import mean_shift
from moee_analysis.extraction.record.accumulate import Accumulator, Sums, accumulate
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite

IMAGES = 400  # enough to show what is a property of the layer
CHUNK = 50  # images at a time


def scale_by_coherence(
    tokens: TokenSource,
    layers: Sequence[LayerExperts],
    scores: Mapping[str, np.ndarray],
    kept: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Multiply the scores of the routed experts of every layer by its measured coherence.

    ``scores`` and the neurons ``kept`` by a first allocation, bool, are (experts, hidden) by site.
    """
    images = spread_images(len(tokens.images))
    routed = [layer for layer in layers if layer.converted and not layer.unread]
    accumulators = [
        CoherenceAccumulator(e.site, e.assignment, kept[e.site.name], images, e.statistics)
        for e in routed
    ]
    leading = {layer.site.name: layer.assignment.leading for layer in routed}
    some = replace(tokens, numbers=tuple(images.tolist()))
    scaled = dict(scores)
    for site, coherence in accumulate(some, accumulators, label="measuring coherence"):
        scaled[site.name] = scores[site.name].copy()
        scaled[site.name][leading[site.name] :] *= coherence
    return scaled


def spread_images(count: int, *, most: int = IMAGES) -> np.ndarray:
    """Numbers of at most so many images from all over a set, which may be sorted."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


@dataclass(frozen=True)
class CoherenceAccumulator(Accumulator):
    """What the errors of whole images cost, and what they cost token by token, in nats.

    Errors are of routed tokens of ``images``, in a layer whose experts keep ``kept``, bool
    (experts, hidden), with the means of the other neurons made good.
    """

    site: MlpSite
    assignment: Assignment
    kept: np.ndarray
    images: np.ndarray
    statistics: ExpertStatistics = field(compare=False)
    gradients: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Two sums."""
        return {"together": (), "apart": ()}

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        sample, seen = layer.sample, layer.sample.image
        images = self.images[(self.images >= seen.min()) & (self.images <= seen.max())]
        if len(images) == 0:
            return
        _, members = self.assignment.of(layer)
        metrics = torch.stack(list(find_metrics(layer.mlp, self.statistics))).float()
        W2 = layer.mlp.fc2.weight.detach().float().cpu()
        kept, means = torch.from_numpy(self.kept), torch.from_numpy(self.statistics.means).float()
        shifts = mean_shift(W2, kept, means)
        for few in np.array_split(images, -(-len(images) // CHUNK)):
            rows = np.flatnonzero(np.isin(seen, few) & (members >= self.assignment.leading))
            expert, weight = torch.from_numpy(members[rows]), torch.from_numpy(sample.weight[rows])
            # What the dropped neurons contribute beyond their mean, (n, dim).
            errors = shifts[expert] - (layer.hidden(rows).cpu() * ~kept[expert]) @ W2.T
            # Half the mean square of what the errors of each image move the logits by.
            moved = torch.from_numpy(sample.gradients(rows)).mul_(errors).sum(dim=2) * weight
            image = torch.from_numpy(np.searchsorted(few, seen[rows]))
            together = moved.new_zeros(len(moved), len(few)).index_add_(1, image, moved)
            sums["together"] += float(together.square().mean(dim=0).sum()) / 2
            # Sum over tokens of delta^T Q_e delta, with Q_e half the Fisher information.
            apart = 0.0
            for number, own in enumerate(by_expert(members[rows], len(metrics))):
                delta = errors[own]
                cost = ((delta @ metrics[number]) * delta).sum(dim=1, dtype=torch.float64)
                apart += float(cost @ weight[own].double())
            sums["apart"] += apart

    def compute(self, sums: Sums) -> float:
        """Cost together over cost apart: about 1 for independent errors, 1 where none is read."""
        together, apart = float(sums["together"]), float(sums["apart"])
        return together / apart if together > 0 and apart > 0 else 1.0
