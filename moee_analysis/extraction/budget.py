"""How much every expert keeps, and every head: one share for all, or one budget for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention_plan import AttentionPlan
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.experts.variance_share import rank_neurons, variance_for_macs
from moee_analysis.extraction.lagrangian import Offer, choose
from moee_analysis.extraction.plan import LayerPlan
from moee_analysis.models.macs import count, count_parameters

WORTHWHILE = 0.1  # of a layer's MACs: about what routing and masks take of its time
OF_MEAN = 0.25  # but no more of what layers save on average, so that others can bear it


@dataclass(frozen=True)
class Sizes:
    """The neurons that every expert keeps, and the modes that every head does.

    ``kept`` bool (experts, hidden), by site name; ``variance_kept`` is the share p of its scores
    that every expert keeps, None for a global budget. ``modes``, by the name of an attention of
    low rank: its kept scores and values, both bool (heads, head_dim), as many in every head.
    """

    kept: dict[str, np.ndarray]
    variance_kept: float | None
    modes: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def sized(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    config: ExtractConfig,
    attentions: Sequence[AttentionPlan] = (),
) -> Sizes:
    """Choose the neurons of converted layers, and modes of ``attentions``, by ``config``'s budget.

    Raises
    ------
    MoeeError
        A budget that cannot be met.
    """
    converted = [plan for plan in plans if plan.converted]
    if config.budget == "global":
        return _globally(model, converted, config, attentions)
    p = config.variance_kept
    if config.macs_reduction is not None:
        p = _share_for_macs(model, converted, attentions, config.macs_reduction)
    return _of_share(converted, attentions, p)


def without_thin(plans: Sequence[LayerPlan], kept: Mapping[str, np.ndarray]) -> list[LayerPlan]:
    """Leave those layers dense whose experts would save less than is worth routing for.

    That is :data:`WORTHWHILE` of their MACs, or :data:`OF_MEAN` of what routed layers save on
    average if that is less. Layers that need no router are converted however little that saves.
    ``kept`` are the neurons of every expert, bool (experts, hidden), by site name.
    """
    routed = [plan for plan in plans if plan.converted and plan.partition.centres is not None]
    saved = {plan.site.name: _saved(plan, kept[plan.site.name]) for plan in routed}
    least = min(WORTHWHILE, OF_MEAN * float(np.mean(list(saved.values()) or [0])))
    thin = {name: share for name, share in saved.items() if share < least}
    return [_left_dense(p, thin[p.site.name]) if p.site.name in thin else p for p in plans]


def _left_dense(plan: LayerPlan, saved: float) -> LayerPlan:
    reason = f"its experts would save {max(saved, 0):.0%} of its MACs"
    partition = replace(plan.partition, reason=reason)
    return replace(plan, partition=partition, known=None, scores=None, thin=True)


def _saved(plan: LayerPlan, kept: np.ndarray) -> float:
    """Share of a layer's MACs that it saves, its router counted."""
    return 1 - _macs(plan, kept) / (2 * plan.site.dim * plan.site.hidden)


def _of_share(plans: Sequence[LayerPlan], attentions: Sequence[AttentionPlan], p: float) -> Sizes:
    """What holds the share ``p`` of the scores of every expert, and of every attention."""
    kept = {
        plan.site.name: _with_whole(plan, _fewest(plan.scores.neurons, p) & ~plan.constant[:, None])
        for plan in plans
    }
    modes = {
        each.site.name: each.in_heads(*(_fewest(offer.scores, p) for offer in each.offers()))
        for each in attentions
        if each.modes is not None
    }
    return Sizes(kept, p, modes)


def _with_whole(plan: LayerPlan, kept: np.ndarray) -> np.ndarray:
    """``kept``, and all neurons of the tokens that are kept dense, bool (experts, hidden)."""
    return kept | plan.whole[:, None]


def _fewest(scores: np.ndarray, p: float) -> np.ndarray:
    """The fewest that hold the share ``p`` of each row's ``scores``, a bool of their shape."""
    kept = np.zeros(scores.shape, dtype=bool)
    for row, ids in enumerate(rank_neurons(scores).kept(p)):
        kept[row, ids] = True
    return kept


def _share_for_macs(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    attentions: Sequence[AttentionPlan],
    reduction: float,
) -> float:
    dense = count(model, sites=[each.site.name for each in (*plans, *attentions)])

    def macs(p: float) -> float:
        sizes = _of_share(plans, attentions, p)
        cost = {plan.site.name: _macs(plan, sizes.kept[plan.site.name]) for plan in plans}
        for each in attentions:
            cost[each.site.name] = each.macs(sizes.modes.get(each.site.name)) / each.tokens
        return dense.replacing(cost)

    return variance_for_macs(macs, dense=dense.total, reduction=reduction)


def _macs(plan: LayerPlan, kept: np.ndarray) -> float:
    """Expected MACs of one token, router included."""
    return plan.router().macs + 2 * plan.site.dim * float(plan.shares @ kept.sum(axis=1))


def _globally(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    config: ExtractConfig,
    attentions: Sequence[AttentionPlan],
) -> Sizes:
    """What is worth most within the budgets of MACs and stored parameters."""
    low_rank = [each for each in attentions if each.modes is not None]
    offers = [_offer(plan) for plan in plans]
    offers += [offer for each in low_rank for offer in each.offers()]
    budgets = {}
    if config.macs_reduction is not None:
        budgets["macs"] = _free_macs(model, plans, attentions, config.macs_reduction)
    if config.params_reduction is not None:
        budgets["parameters"] = _free_parameters(model, plans, attentions, config)
    chosen = iter(choose(offers, **budgets))
    kept = {plan.site.name: _with_whole(plan, next(chosen)) for plan in plans}
    modes = {each.site.name: each.in_heads(next(chosen), next(chosen)) for each in low_rank}
    return Sizes(kept, None, modes)


def _free_macs(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    attentions: Sequence[AttentionPlan],
    reduction: float,
) -> float:
    """MACs of one image that are left for neurons and modes."""
    sites = [each.site.name for each in (*plans, *attentions)]
    dense = count(model, sites=sites)
    nothing = {plan.site.name: np.zeros_like(plan.scores.neurons, dtype=bool) for plan in plans}
    fixed = {p.site.name: _macs(p, _with_whole(p, nothing[p.site.name])) for p in plans}
    fixed |= {each.site.name: each.fixed_macs / each.tokens for each in attentions}
    return (1 - reduction) * dense.total - dense.replacing(fixed)


def _free_parameters(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    attentions: Sequence[AttentionPlan],
    config: ExtractConfig,
) -> int:
    """Stored parameters that are left for neurons and modes."""
    total = count_parameters(model)
    inside = sum(count_parameters(each.site.module(model)) for each in (*plans, *attentions))
    fixed = sum(_fixed_parameters(plan, model, config) for plan in plans)
    fixed += sum(each.fixed_parameters for each in attentions)
    free = (1 - config.params_reduction) * total - (total - inside) - fixed
    if free < 0 and any(plan.whole.any() for plan in plans):
        raise MoeeError(
            f"a parameters reduction of {config.params_reduction:.1%}",
            f"layers that store all of their neurons for dense_tokens={config.dense_tokens}",
            "keep no tokens dense, or bind only the MACs",
        )
    return free


def _offer(plan: LayerPlan) -> Offer:
    unasked = (plan.constant | plan.whole)[:, None]  # these keep none, or all, at any price
    scores = np.where(unasked, 0, plan.scores.neurons)
    parameters = 0 if plan.whole.any() else _per_neuron(plan)
    return Offer(scores, plan.tokens * plan.shares, macs=2 * plan.site.dim, parameters=parameters)


def _per_neuron(plan: LayerPlan) -> int:
    """Parameters that a layer stores for a hidden neuron."""
    return 2 * plan.site.dim + 1


def _fixed_parameters(plan: LayerPlan, model: nn.Module, config: ExtractConfig) -> int:
    """What a converted layer stores in any case: the output bias, router and shifts.

    And all neurons, where tokens are kept dense.
    """
    out = plan.site.module(model).fc2.out_features
    shifts = 0 if config.refit == "none" else out * len(plan.shares)
    neurons = plan.site.hidden * _per_neuron(plan) if plan.whole.any() else 0
    return out + count_parameters(plan.router()) + shifts + neurons
