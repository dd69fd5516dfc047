"""How many neurons every expert keeps: one share for all of them, or one budget for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moee_analysis.budget import Offer, choose
from moee_analysis.counting import count, count_parameters
from moee_analysis.selection import rank_neurons, variance_for_macs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moee_analysis.config import ExtractConfig
    from moee_analysis.planning import LayerPlan


@dataclass(frozen=True)
class Sizes:
    """The neurons that every expert keeps.

    ``kept`` bool (experts, hidden), by site name; ``variance_kept`` is the share p of its scores
    that every expert keeps, None for a global budget.
    """

    kept: dict[str, np.ndarray]
    variance_kept: float | None


def sized(model: nn.Module, plans: Sequence[LayerPlan], config: ExtractConfig) -> Sizes:
    """Choose the neurons of the converted layers by the budget of ``config``.

    Raises
    ------
    MoeeError
        A budget that cannot be met.
    """
    converted = [plan for plan in plans if plan.converted]
    if config.budget == "global":
        return Sizes(_globally(model, converted, config), None)
    p = config.variance_kept
    if config.macs_reduction is not None:
        p = _share_for_macs(model, converted, config.macs_reduction)
    return Sizes({plan.site.name: _of_share(plan, p) for plan in converted}, p)


def _of_share(plan: LayerPlan, p: float) -> np.ndarray:
    """The fewest neurons that hold the share ``p`` of each expert's scores."""
    kept = np.zeros(plan.scores.neurons.shape, dtype=bool)
    for expert, ids in enumerate(rank_neurons(plan.scores.neurons).kept(p)):
        kept[expert, ids] = not plan.constant[expert]
    return kept


def _share_for_macs(model: nn.Module, plans: Sequence[LayerPlan], reduction: float) -> float:
    dense = count(model)

    def macs(p: float) -> float:
        return dense.replacing({plan.site.name: _macs(plan, _of_share(plan, p)) for plan in plans})

    return variance_for_macs(macs, dense=dense.total, reduction=reduction)


def _macs(plan: LayerPlan, kept: np.ndarray) -> float:
    """Expected MACs of one token, router included."""
    return plan.router().macs + 2 * plan.site.dim * float(plan.shares @ kept.sum(axis=1))


def _globally(
    model: nn.Module, plans: Sequence[LayerPlan], config: ExtractConfig
) -> dict[str, np.ndarray]:
    """The neurons that are worth most within the budgets of MACs and stored parameters."""
    offers = [_offer(plan) for plan in plans]
    budgets = {}
    if config.macs_reduction is not None:
        dense = count(model)
        fixed = dense.replacing({plan.site.name: plan.router().macs for plan in plans})
        budgets["macs"] = (1 - config.macs_reduction) * dense.total - fixed
    if config.params_reduction is not None:
        fixed = sum(_fixed_parameters(plan, model, config) for plan in plans)
        total = count_parameters(model)
        inside = sum(count_parameters(plan.site.module(model)) for plan in plans)
        budgets["parameters"] = (1 - config.params_reduction) * total - (total - inside) - fixed
    kept = choose(offers, **budgets)
    return {plan.site.name: mask for plan, mask in zip(plans, kept, strict=True)}


def _offer(plan: LayerPlan) -> Offer:
    scores = np.where(plan.constant[:, None], 0, plan.scores.neurons)
    return Offer(
        scores, plan.tokens * plan.shares, macs=2 * plan.site.dim, parameters=2 * plan.site.dim + 1
    )


def _fixed_parameters(plan: LayerPlan, model: nn.Module, config: ExtractConfig) -> int:
    """What a converted layer stores beside its neurons: the output bias, router and shifts."""
    out = plan.site.module(model).fc2.out_features
    shifts = 0 if config.refit == "none" else out * len(plan.shares)
    return out + count_parameters(plan.router()) + shifts
