"""A union of neurons that shrinks in steps: what is left is scored again on what is left.

Elimination scores a neuron of one expert as if all other neurons were there for the asking. Where
the stored parameters are bound, many are not: they go from all experts of a layer at once, and
with them what could have stood in for others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moee_analysis.coherence import scaled
from moee_analysis.planning import sampled
from moee_analysis.progress import progress
from moee_analysis.recorded import recorded_layer
from moee_analysis.scoring import score
from moee_analysis.sizing import sized

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from torch import nn

    from moee_analysis.attention_planning import AttentionPlan
    from moee_analysis.config import ExtractConfig
    from moee_analysis.images import ImageSet
    from moee_analysis.planning import LayerPlan
    from moee_analysis.recorded import Recorded

STEPS = (0.35, 0.7, 1.0)  # shares of the parameters to save


def narrowed(
    model: nn.Module,
    images: ImageSet,
    plans: Sequence[LayerPlan],
    config: ExtractConfig,
    *,
    attentions: Sequence[AttentionPlan] = (),
    root: Path,
) -> list[LayerPlan]:
    """Score the neurons again within the unions that a budget of parameters leaves, step by step.

    What is not in the last union scores nothing. ``images`` and ``root`` are those of the
    ``plans``; the configuration binds the parameters, those of ``attentions`` among them.
    """
    activations = sampled(model, images, config, root=root)
    for step in STEPS:
        asked = replace(config, params_reduction=step * config.params_reduction)
        kept = sized(model, plans, asked, attentions).kept
        found = []
        for plan in progress(plans, label="narrowing unions"):
            if plan.converted and not plan.constant.any():
                layer = recorded_layer(activations, model, plan.site)
                found.append(_rescored(layer, plan, kept[plan.site.name].any(axis=0), config))
            else:
                found.append(plan)
        plans = found
    return list(plans)


def _rescored(
    layer: Recorded, plan: LayerPlan, among: np.ndarray, config: ExtractConfig
) -> LayerPlan:
    """A plan whose scores are those ``among`` some neurons, bool (hidden,)."""
    scores = score(
        layer.mlp, layer.sample, plan.members, plan.kinds(layer),
        order=config.order, metric=config.metric, among=among,
    )  # fmt: skip
    return scaled(replace(plan, scores=scores, coherence=1.0), plan.coherence)
