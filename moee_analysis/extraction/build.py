"""Phase 3: a model whose MLPs are experts cut out of the dense layers, behind their routers."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.experts.neuron_scores import metrics_of
from moee_analysis.extraction.experts.refit_w2 import RefitAccumulator, mean_shift, shared_readout
from moee_analysis.extraction.record.accumulate import TINY, accumulate
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.moe.layer import MoeMlp, Readout, replace_module
from moee_analysis.utils.progress import progress


def build_moe(
    tokens: TokenSource,
    layers: Sequence[LayerExperts],
    kept: Mapping[str, np.ndarray],
    *,
    refit: str,
) -> nn.Module:
    """Copy the calibrated model with its converted layers replaced by mixtures of experts.

    ``kept`` are the neurons of every expert, bool (experts, hidden), by site name.
    """
    moe = copy.deepcopy(tokens.model)
    device = next(moe.parameters()).device
    layers = [layer for layer in layers if layer.converted]
    readouts = _readouts(tokens, layers, kept, refit=refit)
    for layer in layers:
        name, mlp = layer.site.name, layer.site.module(moe)
        experts = [np.flatnonzero(of_expert) for of_expert in kept[name]]
        shares = layer.statistics.shares
        routed = MoeMlp(mlp, layer.router(), experts, shares, readouts.get(name))
        replace_module(moe, name, routed.to(device))
    return moe.eval()


def _readouts(
    tokens: TokenSource,
    layers: Sequence[LayerExperts],
    kept: Mapping[str, np.ndarray],
    *,
    refit: str,
) -> dict[str, Readout]:
    """What stands in for the dropped neurons of each layer; nothing without a refit."""
    if refit == "none":
        return {}
    W2 = {
        e.site.name: e.site.module(tokens.model).fc2.weight.detach().float().cpu() for e in layers
    }
    means = {e.site.name: torch.from_numpy(e.statistics.means).float() for e in layers}
    masks = {e.site.name: torch.from_numpy(kept[e.site.name]) for e in layers}
    if refit == "shift":
        return {n: Readout(shift=mean_shift(W2[n], masks[n], means[n])) for n in masks}
    accumulators = [refit_accumulator(layer, kept[layer.site.name], tokens) for layer in layers]
    found = accumulate(tokens, accumulators, label="refitting layers")
    solved = progress(found, label="solving for output weights", total=len(layers))
    return {
        site.name: shared_readout(W2[site.name], sums, masks[site.name], means[site.name])
        for site, sums in solved
    }


def refit_accumulator(
    layer: LayerExperts, kept: np.ndarray, tokens: TokenSource
) -> RefitAccumulator:
    """What a layer adds up for one W2, its experts keeping ``kept``, bool (experts, hidden).

    An expert's token counts by the mean of its metric's diagonal, the weight of a squared error.
    """
    statistics, mlp = layer.statistics, layer.site.module(tokens.model)
    metric = np.array([float(Q.diagonal().mean()) for Q in metrics_of(mlp, statistics)])
    of_image = layer.tokens * statistics.shares * metric
    weights = of_image / np.maximum(statistics.weight, TINY)
    return RefitAccumulator(layer.site, layer.assignment, kept, statistics.means, weights)
