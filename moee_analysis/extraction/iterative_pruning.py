"""A union of neurons that shrinks in steps: what is left is scored again on what is left.

Elimination scores a neuron of one expert as if all other neurons were there for the asking. Where
the stored parameters are bound, many are not: they go from all experts of a layer at once, and
with them what could have stood in for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moee_analysis.extraction.attention_plan import AttentionPlan
from moee_analysis.extraction.budget import sized
from moee_analysis.extraction.cross_token_fisher import scaled
from moee_analysis.extraction.experts.neuron_scores import eliminated, score
from moee_analysis.extraction.plan import LayerPlan
from moee_analysis.extraction.record.calibration_set import Calibration

STEPS = (0.35, 0.7, 1.0)  # shares of the parameters to save


def narrowed(
    calibration: Calibration,
    plans: Sequence[LayerPlan],
    *,
    attentions: Sequence[AttentionPlan] = (),
) -> list[LayerPlan]:
    """Score the neurons again within the unions that a budget of parameters leaves, step by step.

    What is not in the last union scores nothing. The calibration is that of the ``plans``; its
    configuration binds the parameters, those of ``attentions`` among them.
    """
    config = calibration.config
    for step in STEPS:
        asked = replace(config, params_reduction=step * config.params_reduction)
        kept = sized(calibration.model, plans, asked, attentions).kept
        routed = {
            p.site.name: p for p in plans if p.converted and not p.unread and not any(p.whole)
        }
        unions = {name: kept[name].any(axis=0) for name in routed}
        again = _rescored(calibration, routed, unions)
        plans = [again.get(plan.site.name, plan) for plan in plans]
    return list(plans)


def _rescored(
    calibration: Calibration, plans: Mapping[str, LayerPlan], among: Mapping[str, np.ndarray]
) -> dict[str, LayerPlan]:
    """Plans whose scores are those ``among`` some neurons, bool (hidden,), by site name."""
    order, costs = calibration.config.order, {}
    if order == "obs":
        assignments = {name: plan.assignment for name, plan in plans.items()}
        known = {name: plan.known for name, plan in plans.items()}
        costs = eliminated(calibration, assignments, known, among=among)
    found = {}
    for name, plan in plans.items():
        mlp = plan.site.module(calibration.model)
        scores = score(mlp, plan.known, order=order, costs=costs.get(name), among=among[name])
        found[name] = scaled(replace(plan, scores=scores, coherence=1.0), plan.coherence)
    return found
