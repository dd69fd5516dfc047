"""From plans to a model: experts cut out of the dense layers, their outputs refitted."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.layers import MoeMlp, Readout, replace_module
from moee_analysis.moments import moments_of
from moee_analysis.planning import sampled
from moee_analysis.progress import progress
from moee_analysis.recorded import recorded_layer
from moee_analysis.refit import Part, each_readout, mean_shift, shared_readout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.config import ExtractConfig
    from moee_analysis.images import ImageSet
    from moee_analysis.planning import LayerPlan
    from moee_analysis.recorded import Recorded


def build_moe(
    model: nn.Module,
    images: ImageSet,
    plans: Sequence[LayerPlan],
    kept: Mapping[str, np.ndarray],
    config: ExtractConfig,
    *,
    root: Path,
) -> nn.Module:
    """Copy ``model`` with its planned layers replaced by mixtures of experts.

    ``kept`` are the neurons of every expert, bool (experts, hidden), by site name; ``images`` and
    ``root`` are those of the plans.
    """
    moe = copy.deepcopy(model)
    activations = sampled(model, images, config, root=root)
    device = next(model.parameters()).device
    for plan in progress([p for p in plans if p.converted], label="refitting layers"):
        layer = recorded_layer(activations, model, plan.site)
        mask = kept[plan.site.name]
        readout = refitted(layer, plan, mask, config.refit)
        experts = [np.flatnonzero(of_expert) for of_expert in mask]
        mlp = plan.site.module(moe)
        replacement = MoeMlp(mlp, plan.router(), experts, plan.shares, readout)
        replace_module(moe, plan.site.name, replacement.to(device))
    return moe.eval()


def refitted(layer: Recorded, plan: LayerPlan, kept: np.ndarray, refit: str) -> Readout:
    """What stands in for the dropped neurons of a layer, by the name of the refit."""
    if refit == "none":
        return Readout()
    weight = layer.mlp.fc2.weight.detach().float().cpu()
    mask = torch.from_numpy(kept)
    if refit == "shift":
        means = torch.from_numpy(plan.scores.means).float()
        return Readout(shift=mean_shift(weight, mask, means))
    fit = shared_readout if refit == "shared" else each_readout
    return fit(weight, _parts(layer, plan, mask))


def _parts(layer: Recorded, plan: LayerPlan, kept: torch.Tensor) -> Iterator[Part]:
    for expert, mask in enumerate(kept):
        moments = moments_of(layer.sample, np.flatnonzero(plan.members == expert))
        tokens = plan.tokens * float(plan.shares[expert])
        yield Part(mask, moments, weight=tokens * float(plan.scores.weight[expert]))
