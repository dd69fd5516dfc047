"""A dense model in, its MLPs as experts out."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.baselines.moefication.budget import Dealt, chosen_sites, dealt
from moee_analysis.baselines.moefication.config import MoeficationConfig
from moee_analysis.baselines.moefication.layer_tokens import (
    BLOCK,
    LayerTokens,
    in_folder,
    layer_tokens,
    recorded_inputs,
)
from moee_analysis.baselines.moefication.neuron_splits import centres, expert_of_neurons, told
from moee_analysis.baselines.moefication.routers import CentreRouter, GroundTruthRouter, Origin
from moee_analysis.baselines.moefication.train_router import trained
from moee_analysis.data.images import ImageSet
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, replace_module
from moee_analysis.moe.routers import ConstantRouter, RandomRouter
from moee_analysis.utils.progress import tell


@torch.inference_mode(mode=False)
def convert(
    dense: nn.Module,
    images: ImageSet,
    config: MoeficationConfig,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Turn the MLPs of a copy of ``dense`` into experts.

    Each layer's ``origin`` says how it was made: the graph is divided by METIS where that is
    installed (``pip install moee-analysis[graph]``), or else by its eigenvectors.

    Parameters
    ----------
    images
        Calibration images; their labels are not used.
    store
        Folder that keeps the recorded inputs of the layers, and has them if they were recorded
        before; None keeps nothing.

    Raises
    ------
    MoeeError
        No MLPs to convert, more experts than neurons, a budget that cannot be met, a full disk.
    """
    source = _source(dense, config)
    sites = chosen_sites(source, config)
    sizes = dealt(source, config)
    if config.split == "graph":
        tell(f"MoEfication: experts by {told('graph')}")
    with in_folder(store) as root:
        recording = recorded_inputs(
            source, images, sites, tokens=config.tokens, seed=config.seed, root=root
        )
        for site in sites:
            tokens = layer_tokens(recording.layer(site), site.module(source), seed=config.seed)
            layer = _moefied(tokens, config, sizes[site.name])
            replace_module(source, site.name, layer)
    return source


def oracle_routed(moefied: nn.Module) -> nn.Module:
    """Copy a converted model, and route each token to the k experts of the highest true score."""
    model = copy.deepcopy(moefied)
    for layer in moe_layers(model).values():
        k = round(layer.shares.sum().item())
        layer.router = GroundTruthRouter(layer, layer.origin, k=k).to(layer.shares.device)
    return model


def _source(dense: nn.Module, config: MoeficationConfig) -> nn.Module:
    """A copy of the dense model with the activation that is asked for."""
    source = copy.deepcopy(dense).eval()
    if config.activation == "relu":
        for site in chosen_sites(source, config):
            site.module(source).act = nn.ReLU()
    return source


@torch.no_grad()
def _moefied(tokens: LayerTokens, config: MoeficationConfig, size: Dealt) -> MoeMlp:
    expert_of = expert_of_neurons(config.split, tokens, size.experts, seed=config.seed)
    origin = Origin(told(config.split), config.score, tokens.mean())
    layer = _layer(tokens.mlp, expert_of, origin, compensated=config.mean_compensation)
    layer.router = _router(layer, expert_of, tokens, config, k=size.k).to(layer.shares.device)
    used = layer.usage(torch.cat([layer.router(x) for x in tokens.inputs.split(BLOCK)]))
    layer.shares.copy_(used / len(tokens.inputs))
    return layer


def _layer(mlp: nn.Module, expert_of: np.ndarray, origin: Origin, *, compensated: bool) -> MoeMlp:
    """The experts of ``mlp``; all of them together are the MLP, compensated or not."""
    count = int(expert_of.max()) + 1
    neurons = [np.flatnonzero(expert_of == expert) for expert in range(count)]
    shift = _means(mlp, neurons, origin.mean) if compensated else None
    readout = Readout(shift=None if shift is None else -shift)
    layer = MoeMlp(mlp, nn.Identity(), neurons, np.ones(count), readout)
    if shift is not None:
        layer.fc2.bias += shift.sum(0).to(layer.fc2.bias)
    layer.origin = origin
    return layer.to(mlp.fc1.weight.device)


def _means(mlp: nn.Module, experts: list[np.ndarray], mean: torch.Tensor) -> torch.Tensor:
    """Mean output W2_e mu_e of every expert, float64 (experts, dim)."""
    weight = mlp.fc2.weight.double()
    return torch.stack([weight[:, ids] @ mean[ids] for ids in experts])


def _router(
    layer: MoeMlp, expert_of: np.ndarray, tokens: LayerTokens, config: MoeficationConfig, *, k: int
) -> nn.Module:
    own = centres(layer.fc1.weight, expert_of)
    truth = GroundTruthRouter(layer, layer.origin, k=k).to(own.device)
    if config.router == "centre":
        return CentreRouter(own, k=k)
    if config.router == "mlp":
        scores, image = truth.scores(tokens.inputs), tokens.image
        return trained(own, tokens.inputs, scores, image=image, k=k, seed=config.seed).router
    if config.router == "constant":
        best = truth.scores(tokens.inputs).mean(0).topk(k).indices
        return ConstantRouter(best.sort().values.tolist())
    if config.router == "random":
        even = torch.full((layer.n_experts,), k / layer.n_experts)
        return RandomRouter(even, dim=layer.fc1.in_features, k=k, seed=config.seed)
    return truth
