"""From plans to a model: experts cut out of the dense layers, their outputs refitted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.experts.expert_covariances import covariances
from moee_analysis.extraction.experts.refit_w2 import (
    RefitTally,
    each_readout,
    mean_shift,
    shared_readout,
)
from moee_analysis.extraction.plan import LayerPlan
from moee_analysis.extraction.record.accumulate import Sums, summed
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.moe.layer import MoeMlp, Readout, replace_module
from moee_analysis.utils.progress import progress


def build_moe(
    calibration: Calibration, plans: Sequence[LayerPlan], kept: Mapping[str, np.ndarray]
) -> nn.Module:
    """Copy the calibrated model with its planned layers replaced by mixtures of experts.

    ``kept`` are the neurons of every expert, bool (experts, hidden), by site name.
    """
    moe = copy.deepcopy(calibration.model)
    device = next(moe.parameters()).device
    converted = {plan.site.name: plan for plan in plans if plan.converted}
    readouts = _readouts(calibration, converted, kept)
    for name, plan in converted.items():
        experts = [np.flatnonzero(of_expert) for of_expert in kept[name]]
        mlp = plan.site.module(moe)
        replacement = MoeMlp(mlp, plan.router(), experts, plan.shares, readouts[name])
        replace_module(moe, name, replacement.to(device))
    return moe.eval()


def _readouts(
    calibration: Calibration, plans: Mapping[str, LayerPlan], kept: Mapping[str, np.ndarray]
) -> dict[str, Readout]:
    """What stands in for the dropped neurons of each layer, by the name of the refit."""
    refit = calibration.config.refit
    if refit == "none":
        return dict.fromkeys(plans, Readout())
    old = {name: _Old.of(calibration.model, plan, kept[name]) for name, plan in plans.items()}
    if refit == "shift":
        return {n: Readout(shift=mean_shift(o.weight, o.kept, o.means)) for n, o in old.items()}
    if refit == "each":
        return _for_each(calibration, plans, old)
    tallies = [refit_tally(plan, kept[name]) for name, plan in plans.items()]
    found = summed(calibration, tallies, label="refitting layers")
    solved = progress(found, label="solving for output weights", total=len(tallies))
    return {tally.site.name: old[tally.site.name].shared(sums) for tally, sums in solved}


def _for_each(
    calibration: Calibration, plans: Mapping[str, LayerPlan], old: Mapping[str, _Old]
) -> dict[str, Readout]:
    assignments = {name: plan.assignment for name, plan in plans.items()}
    means = {name: plan.known.means for name, plan in plans.items()}
    found = covariances(calibration, assignments, means, label="refitting experts")
    return {
        name: old[name].each(covariance for *_, covariance in of_layer)
        for name, of_layer in groupby(found, key=lambda item: item[0])
    }


def refit_tally(plan: LayerPlan, kept: np.ndarray) -> RefitTally:
    """What a layer adds up for one W2, its experts keeping ``kept``, bool (experts, hidden)."""
    known = plan.known
    of_image = plan.tokens * plan.shares * plan.scores.weight
    weights = of_image / np.maximum(known.weight, np.finfo(float).tiny)
    return RefitTally(plan.site, plan.assignment, kept, known.means, weights)


@dataclass(frozen=True)
class _Old:
    """A layer before its refit: W2, neurons and mean activations of its experts."""

    weight: torch.Tensor
    kept: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, plan: LayerPlan, kept: np.ndarray) -> _Old:
        weight = plan.site.module(model).fc2.weight.detach().float().cpu()
        means = torch.from_numpy(plan.known.means).float()
        return cls(weight, torch.from_numpy(kept), means)

    def shared(self, sums: Sums) -> Readout:
        return shared_readout(self.weight, sums, self.kept, self.means)

    def each(self, covariances: Iterable[torch.Tensor]) -> Readout:
        return each_readout(self.weight, covariances, self.kept, self.means)
