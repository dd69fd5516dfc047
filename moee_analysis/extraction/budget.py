"""How much every expert keeps, and every head: one share for all, or one budget for the model.

MoEE (CVPR 2025), phase 2: rank the neurons of a cluster by their intra-cluster variance and keep
the smallest set whose variances add up to p % of the total.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention import AttentionPlan, KeptModes
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.lagrangian import Candidates, choose
from moee_analysis.models.macs import MacCount, count_parameters

BISECTIONS = 50
Scores = Mapping[str, np.ndarray]  # of neurons, (experts, hidden), by site name


@dataclass(frozen=True)
class Sizes:
    """The neurons that every expert keeps, and the modes that every head does.

    ``neurons`` bool (experts, hidden), ``modes`` (as many in every head) by site name;
    ``variance_kept`` is the share p of its scores that every expert keeps; None: a global budget.
    """

    neurons: dict[str, np.ndarray]
    variance_kept: float | None
    modes: dict[str, KeptModes] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The budget of ``config`` for a ``model`` that costs ``dense``, ``attentions`` among it.

    ``whole`` are the MACs that are to be saved from: before tokens merge.
    """

    model: nn.Module
    dense: MacCount
    whole: int
    config: ExtractConfig
    attentions: Sequence[AttentionPlan] = ()

    def allocate(self, layers: Sequence[LayerExperts], scores: Scores) -> Sizes:
        """Choose the neurons of the converted ``layers``, and the modes of attentions."""
        layers = [layer for layer in layers if layer.converted]
        if self.config.budget == "global":
            return self._global(layers, scores)
        p, reduction = self.config.variance_kept, self.config.macs_reduction
        if reduction is not None:

            def macs(share: float) -> float:
                return self._macs(layers, self._of_share(layers, scores, share))

            p = find_share(macs, dense=self.whole, reduction=reduction)
        return self._of_share(layers, scores, p)

    @property
    def _low_rank(self) -> list[AttentionPlan]:
        return [each for each in self.attentions if each.modes is not None]

    def _of_share(self, layers: Sequence[LayerExperts], scores: Scores, p: float) -> Sizes:
        """The fewest that hold the share ``p`` of the scores of every expert and attention."""
        neurons = {
            layer.site.name: keep_share(scores[layer.site.name], p) & ~layer.constant[:, None]
            for layer in layers
        }
        modes = {
            each.site.name: each.in_heads(*(keep_share(c.scores, p) for c in each.candidates()))
            for each in self._low_rank
        }
        return Sizes(neurons, p, modes)

    def _global(self, layers: Sequence[LayerExperts], scores: Scores) -> Sizes:
        """The neurons and modes worth most within the budgets of MACs and stored parameters."""
        low_rank, candidates = self._low_rank, []
        for layer in layers:
            # experts of tokens that nothing reads keep no neuron at any price
            own = np.where(layer.constant[:, None], 0, scores[layer.site.name])
            tokens, dim = layer.tokens * layer.statistics.shares, layer.site.dim
            candidates.append(Candidates(own, tokens, macs=2 * dim, parameters=2 * dim + 1))
        candidates += [each for attention in low_rank for each in attention.candidates()]
        budgets: dict[str, float] = {}
        if self.config.macs_reduction is not None:
            fixed = {layer.site.name: float(layer.router().macs) for layer in layers}
            for each in self.attentions:
                fixed[each.site.name] = 0.0 if each.modes else each.macs(None) / each.tokens
            budget = (1 - self.config.macs_reduction) * self.whole
            budgets["macs"] = budget - self.dense.replacing(fixed)
        if self.config.params_reduction is not None:
            budgets["parameters"] = self._free_parameters(layers)
        chosen = iter(choose(candidates, **budgets))
        neurons = {layer.site.name: next(chosen) for layer in layers}
        modes = {each.site.name: each.in_heads(next(chosen), next(chosen)) for each in low_rank}
        return Sizes(neurons, None, modes)

    def _macs(self, layers: Sequence[LayerExperts], sizes: Sizes) -> float:
        """MACs of one image with these sizes, routers included."""
        cost = {}
        for layer in layers:
            neurons = layer.statistics.shares @ sizes.neurons[layer.site.name].sum(axis=1)
            cost[layer.site.name] = layer.router().macs + 2 * layer.site.dim * float(neurons)
        for each in self.attentions:
            cost[each.site.name] = each.macs(sizes.modes.get(each.site.name)) / each.tokens
        return self.dense.replacing(cost)

    def _free_parameters(self, layers: Sequence[LayerExperts]) -> float:
        """Stored parameters that are left for neurons and modes."""
        total = count_parameters(self.model)
        changed = (*layers, *self.attentions)
        inside = sum(count_parameters(each.site.module(self.model)) for each in changed)
        fixed = sum(each.fixed_parameters for each in self.attentions)
        for layer in layers:  # the output bias, router and shifts
            out = layer.site.module(self.model).fc2.out_features
            shifts = 0 if self.config.refit == "none" else out * layer.assignment.experts
            fixed += out + count_parameters(layer.router()) + shifts
        return (1 - self.config.params_reduction) * total - (total - inside) - fixed


def keep_share(scores: np.ndarray, share: float) -> np.ndarray:
    """The fewest entries of each row, the highest first, that hold a ``share`` of its sum: bool."""
    order = np.argsort(-scores, axis=1, kind="stable")
    running = np.cumsum(np.take_along_axis(scores, order, axis=1), axis=1)
    total = np.maximum(running[:, -1:], np.finfo(float).tiny)
    short = np.sum(running / total < share - 1e-12, axis=1, keepdims=True)
    counts = scores.shape[1] if share >= 1 else short + 1
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, order, np.arange(scores.shape[1]) < counts, axis=1)
    return kept


def find_share(macs: Callable[[float], float], *, dense: float, reduction: float) -> float:
    """Largest share of the scores at which ``macs``, which never fall, save the ``reduction``."""
    budget = (1 - reduction) * dense
    low, high = 0.0, 1.0
    if macs(low) > budget:
        least = "with one neuron per expert in the layers that have clusters"
        found = f"at most {1 - macs(low) / dense:.1%} {least}"
        hint = "ask for less, or let more layers be converted (see the reasons per layer)"
        raise MoeeError(f"a MACs reduction of {reduction:.1%}", found, hint)
    if macs(high) <= budget:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= budget else (low, middle)
    return low
