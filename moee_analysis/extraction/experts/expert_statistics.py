"""Counts, means, variances and metrics of the tokens of each expert."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from moee_analysis.extraction.cluster.clusters_to_router import Assignment, by_expert
from moee_analysis.extraction.record import accumulate as sums_over
from moee_analysis.extraction.record.accumulate import TINY, Accumulator, Arrays, Sums
from moee_analysis.extraction.record.fisher import expert_metrics, products
from moee_analysis.extraction.record.recorded_tokens import RecordedLayer
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.storage.store import content_key


@dataclass(frozen=True)
class ExpertStatistics:
    """The tokens of each expert of a layer.

    ``routed`` (experts,) is how many tokens go to each, ``weight`` (experts,) how many count for
    it; ``means`` and ``variance`` (experts, hidden) are those of the hidden activations of the
    latter; all float64. ``metrics`` (experts, dim, dim) float32, those of
    ``expert_metrics``; None where errors of the outputs count alike.
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
class StatisticsAccumulator(Accumulator):
    """Sums over the tokens of every expert of a layer."""

    site: MlpSite
    assignment: Assignment
    gradients: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of sums over tokens, over activations and their squares, and of products of gradients.

        ``kinds`` are products over all tokens of a kind, leading or other ones.
        """
        experts, hidden, dim = self.assignment.experts, self.site.hidden, self.site.dim
        shapes = {"routed": (experts,), "weight": (experts,)}
        shapes |= {"hidden": (experts, hidden), "squares": (experts, hidden)}
        if self.gradients:
            shapes |= {"fisher": (experts, dim, dim), "kinds": (2, dim, dim), "of_kinds": (2,)}
        return shapes

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        routed, members = self.assignment.of(layer)
        weight = layer.sample.weight.astype(np.float64)
        sums["routed"] += _counts(routed, weight, len(sums["routed"]))
        sums["weight"] += _counts(members, weight, len(sums["weight"]))
        for rows in layer.chunks():
            hidden = layer.hidden(rows).cpu().double()
            for expert, own in enumerate(by_expert(members[rows], len(sums["weight"]))):
                if len(own):
                    values = hidden[own]
                    counts = torch.from_numpy(weight[rows][own])
                    sums["hidden"][expert] += counts @ values
                    sums["squares"][expert] += counts @ values.square_()
        if self.gradients:
            self._add_gradients(sums, layer, members)

    def _add_gradients(self, sums: Sums, layer: RecordedLayer, members: np.ndarray) -> None:
        for expert, own in enumerate(by_expert(members, len(sums["weight"]))):
            sums["fisher"][expert] += products(layer.sample, own)
        kinds = (layer.sample.position >= len(self.assignment.prefix)).astype(int)
        sums["of_kinds"] += _counts(kinds, layer.sample.weight.astype(np.float64), 2)
        for kind, own in enumerate(by_expert(kinds, 2)):
            sums["kinds"][kind] += products(layer.sample, own)

    def compute(self, sums: Sums) -> ExpertStatistics:
        """Means, variances and metrics."""
        divisor = sums["weight"].clamp_min(TINY)[:, None]
        means = sums["hidden"] / divisor
        variance = (sums["squares"] / divisor - means**2).clamp_min(0)
        metrics = None
        if self.gradients:
            metrics = expert_metrics(sums, self.assignment.kinds).float().numpy()
        plain = [t.numpy() for t in (sums["routed"], sums["weight"], means, variance)]
        return ExpertStatistics(*plain, metrics)


def _counts(experts: np.ndarray, weight: np.ndarray, count: int) -> torch.Tensor:
    """Sum of the weights of the tokens of each expert, those of -1 left out."""
    return torch.from_numpy(np.bincount(experts + 1, weights=weight, minlength=count + 1)[1:])


def expert_statistics(
    tokens: TokenSource, assignments: Mapping[str, Assignment], *, gradients: bool
) -> dict[str, ExpertStatistics]:
    """Statistics of the experts of some layers, by site name, or found in the store.

    Experts without tokens keep their places. ``gradients``: whether there are metrics.
    """
    accumulators = {
        site.name: StatisticsAccumulator(site, assignments[site.name], gradients)
        for site in tokens.sites
        if site.name in assignments
    }

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        chosen = [accumulators[name] for name in missing]
        for site, found in sums_over.accumulate(tokens, chosen, label="statistics of experts"):
            yield site.name, {name: v for name, v in vars(found).items() if v is not None}

    folders = {
        name: f"statistics-{content_key(tokens=tokens.key, **each.facts)}"
        for name, each in accumulators.items()
    }
    found = {}
    for name, files in sums_over.stored_arrays(tokens.root, folders, compute).items():
        arrays = {array: np.load(path) for array, path in files.items() if array != "metrics"}
        if gradients:  # metrics stay on the disk until they are used
            arrays["metrics"] = np.load(files["metrics"], mmap_mode="r")
        found[name] = ExpertStatistics(**arrays)
    return found
