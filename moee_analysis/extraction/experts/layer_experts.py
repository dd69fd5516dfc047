"""The experts of a layer, before any neuron is dropped, and statistics of the tokens of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.cluster.clusters_to_router import Assignment, Partition, by_expert
from moee_analysis.extraction.record import accumulate as sums_over
from moee_analysis.extraction.record.accumulate import TINY, Accumulator, Arrays, Sums
from moee_analysis.extraction.record.fisher import expert_metrics, products
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite
from moee_analysis.moe.routers import TokenKindRouter

Kept = Mapping[str, np.ndarray]  # neurons that experts keep, bool (experts, hidden), by site name


@dataclass(frozen=True)
class ExpertStatistics:
    """The tokens of each expert of a layer.

    ``routed`` (experts,) tokens go to each; of those that count for it, ``weight`` (experts,) is
    how many tokens there were before any merged, ``means`` and ``variance`` (experts, hidden) are
    of hidden activations; all float64. ``metrics`` (experts, dim, dim) float32 are those of
    ``expert_metrics``, if any.
    """

    routed: np.ndarray
    weight: np.ndarray
    means: np.ndarray
    variance: np.ndarray
    metrics: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """Share of the tokens that goes to each expert, (experts,)."""
        return self.routed / self.routed.sum()

    def of(self, chosen: np.ndarray) -> Self:
        """Those of the ``chosen`` experts, bool (experts,)."""
        if chosen.all():
            return self  # metrics stay on the disk
        return ExpertStatistics(*(None if v is None else v[chosen] for v in vars(self).values()))


@dataclass(frozen=True)
class LayerExperts:
    """Which tokens of a layer share an expert; all experts are still the whole MLP.

    ``tokens`` of an image pass through the layer; where it is ``unread``, nothing reads the
    outputs at the patches. Experts of leading tokens (``prefix``: the expert of each) come before
    those of the ``partition``. ``statistics`` are None where the layer stays dense.
    """

    site: MlpSite
    tokens: int
    prefix: tuple[int, ...] = ()
    unread: bool = False
    partition: Partition = field(default_factory=Partition)
    statistics: ExpertStatistics | None = None

    @property
    def converted(self) -> bool:
        """Whether this layer becomes a mixture of experts; the partition's reason says why not."""
        return self.statistics is not None

    @property
    def assignment(self) -> Assignment:
        """Which expert every token of the layer goes to."""
        return Assignment(self.prefix, self.partition)

    @property
    def constant(self) -> np.ndarray:
        """Which experts keep no neuron, bool (experts,): those of tokens that nothing reads."""
        return (self.assignment.kinds == 1) & self.unread

    def router(self) -> nn.Module:
        """Return a new router of this layer."""
        router = self.partition.router()
        return TokenKindRouter(self.prefix, router, tokens=self.tokens) if self.prefix else router


@dataclass(frozen=True)
class StatisticsAccumulator(Accumulator):
    """Sums over the tokens of every expert of a layer."""

    site: MlpSite
    assignment: Assignment
    gradients: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """``fisher`` and ``kinds`` are products of gradients, by expert and by kind of token."""
        experts, hidden, dim = self.assignment.experts, self.site.hidden, self.site.dim
        shapes = {"routed": (experts,), "weight": (experts,)}
        shapes |= {"hidden": (experts, hidden), "squares": (experts, hidden)}
        if self.gradients:
            shapes |= {"fisher": (experts, dim, dim), "kinds": (2, dim, dim), "of_kinds": (2,)}
        return shapes

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        routed, members = self.assignment.of(layer)
        weight, experts = layer.sample.mass(slice(None)).astype(np.float64), self.assignment.experts
        sums["routed"] += _counts(routed, layer.sample.weight.astype(np.float64), experts)
        sums["weight"] += _counts(members, weight, experts)
        for rows in layer.chunks():
            hidden = layer.hidden(rows).cpu().double()
            for expert, own in enumerate(by_expert(members[rows], experts)):
                counts, values = torch.from_numpy(weight[rows][own]), hidden[own]
                sums["hidden"][expert] += counts @ values
                sums["squares"][expert] += counts @ values.square_()
        if self.gradients:
            kinds = (layer.sample.position >= len(self.assignment.prefix)).astype(int)
            sums["of_kinds"] += _counts(kinds, weight, 2)
            for name, numbers in {"fisher": members, "kinds": kinds}.items():
                for number, own in enumerate(by_expert(numbers, len(sums[name]))):
                    sums[name][number] += products(layer.sample, own)

    def compute(self, sums: Sums) -> ExpertStatistics:
        """Means, variances and metrics."""
        divisor = sums["weight"].clamp_min(TINY)[:, None]
        means = sums["hidden"] / divisor
        variance = (sums["squares"] / divisor - means**2).clamp_min(0)
        found = [sums["routed"], sums["weight"], means, variance]
        if self.gradients:
            found.append(expert_metrics(sums, self.assignment.kinds).float())
        return ExpertStatistics(*(tensor.numpy() for tensor in found))


def _counts(experts: np.ndarray, weight: np.ndarray, count: int) -> torch.Tensor:
    """Sum of the weights of the tokens of each expert, those of -1 left out."""
    return torch.from_numpy(np.bincount(experts + 1, weights=weight, minlength=count + 1)[1:])


def gather_statistics(
    tokens: TokenSource, assignments: Mapping[str, Assignment], *, gradients: bool
) -> dict[str, ExpertStatistics]:
    """Statistics of the experts of some layers, by site name, or found in the store."""
    sites = [site for site in tokens.sites if site.name in assignments]
    accumulators = {s.name: StatisticsAccumulator(s, assignments[s.name], gradients) for s in sites}

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        chosen = [accumulators[name] for name in missing]
        for site, found in sums_over.accumulate(tokens, chosen, label="statistics of experts"):
            yield site.name, {name: v for name, v in vars(found).items() if v is not None}

    facts = {name: {"tokens": tokens.key, **each.facts} for name, each in accumulators.items()}
    found = sums_over.stored_arrays(tokens.root, "statistics", facts, compute)
    return {name: ExpertStatistics(**arrays) for name, arrays in found.items()}
