"""A dense model in, its MLPs as experts out, within a budget of MACs."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.baselines.moefication.config import MoeficationConfig
from moee_analysis.baselines.moefication.routers import (
    CentreRouter,
    GroundTruthRouter,
    Origin,
    router_macs,
    train_router,
)
from moee_analysis.baselines.moefication.split_neurons import (
    BLOCK,
    LayerTokens,
    describe_split,
    expert_centres,
    split_neurons,
    thin_sample,
)
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.recording import Recording, load_sample
from moee_analysis.extraction.record.token_kinds import token_plan
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, replace_module
from moee_analysis.moe.routers import ConstantRouter, RandomRouter
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.folders import scratch_folder


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

    - ``images``: calibration images; their labels are not used.
    - ``store``: folder that keeps the recorded inputs of the layers, and has them if they were
      recorded before; None keeps nothing.

    Raises ``MoeeError``: no MLPs to convert, more experts than neurons, a budget that cannot be
    met, a full disk.
    """
    source = _with_activation(dense, config)
    sites, sizes = _choose_sites(source, config), count_experts(source, config)
    if config.split == "graph":
        tell(f"MoEfication: experts by {describe_split('graph')}")
    each = max(1, round(config.tokens / len(images)))
    plan = token_plan(source, [site.name for site in sites], each, seed=config.seed)
    with scratch_folder("store") if store is None else nullcontext(store) as root:
        folder = Recording(source, images, tuple(sites), plan, ("inputs",)).to_disk(Path(root))
        for site in sites:
            sample, mlp = load_sample(folder, site), site.module(source)
            tokens = thin_sample(sample, mlp, seed=config.seed)
            replace_module(source, site.name, _moefy(tokens, config, *sizes[site.name]))
    return source


def oracle_routed(moefied: nn.Module) -> nn.Module:
    """Copy a converted model, and route each token to the k experts of the highest true score."""
    model = copy.deepcopy(moefied)
    for layer in moe_layers(model).values():
        k = round(layer.shares.sum().item())
        layer.router = GroundTruthRouter(layer, layer.origin, k=k).to(layer.shares.device)
    return model


def matching_active(dense: nn.Module, config: MoeficationConfig) -> float:
    """Share of the experts of every layer that the budget of ``config`` allows.

    What is left of the MACs when everything but the MLPs and the routers are paid, as a share of
    what the MLPs cost.

    Raises ``MoeeError``: the MLPs cannot save so much.
    """
    if config.active is not None:
        return config.active
    counted, sites = count(dense), _choose_sites(dense, config)
    fixed = counted.replacing({s.name: router_macs(config, s, config.experts(s)) for s in sites})
    mlps = sum(counted.by_module[site.name] for site in sites)
    active = ((1 - config.macs_reduction) * counted.total - fixed) / mlps
    least = sum(counted.by_module[s.name] / config.experts(s) for s in sites) / mlps
    if not least <= active <= 1:
        _refuse_budget(
            config, *(1 - (fixed + share * mlps) / counted.total for share in (1, least))
        )
    return active


def count_experts(dense: nn.Module, config: MoeficationConfig) -> dict[str, tuple[int, int]]:
    """How many experts each layer has and how many of them, k, a token uses, by site name.

    All layers use the same share of their experts, as nearly as whole experts allow. What rounding
    leaves of one layer's MACs the next one gets, so that all together spend no more than the
    budget, and less than one expert of one layer less.
    """
    active, counted = matching_active(dense, config), count(dense)
    found, left = {}, 0.0
    for site in _choose_sites(dense, config):
        experts = config.experts(site)
        each = counted.by_module[site.name] / experts
        left += active * counted.by_module[site.name]
        k = min(max(1, math.floor(left / each + 1e-6)), experts)
        left -= k * each
        found[site.name] = experts, k
    return found


def _choose_sites(model: nn.Module, config: MoeficationConfig) -> list[MlpSite]:
    sites = find_mlps(model)
    chosen = range(len(sites)) if config.layers is None else config.layers
    unknown = [layer for layer in chosen if layer not in range(len(sites))]
    if unknown or not chosen:
        raise MoeeError(
            f"layers among 0 to {len(sites) - 1}", str(unknown[0] if unknown else "none"),
            "leave out 'layers' to convert all",
        )  # fmt: skip
    return [site for site in sites if site.index in chosen]


def _refuse_budget(config: MoeficationConfig, least: float, most: float) -> None:
    if most < max(least, 0):
        raise MoeeError(
            "a router that leaves MACs to save",
            f"router='{config.router}', which costs more than the experts save",
            "choose another router, or give the share of active experts in place of macs_reduction",
        )
    raise MoeeError(
        f"a MACs reduction between {max(least, 0):.3f} and {most:.3f} with this router",
        f"{config.macs_reduction} with router='{config.router}'",
        "choose another budget or router",
    )


def _with_activation(dense: nn.Module, config: MoeficationConfig) -> nn.Module:
    """A copy of the dense model with the activation that is asked for."""
    source = copy.deepcopy(dense).eval()
    if config.activation == "relu":
        for site in _choose_sites(source, config):
            site.module(source).act = nn.ReLU()
    return source


@torch.no_grad()
def _moefy(tokens: LayerTokens, config: MoeficationConfig, experts: int, k: int) -> MoeMlp:
    expert_of = split_neurons(config.split, tokens, experts, seed=config.seed)
    origin = Origin(describe_split(config.split), config.score, tokens.mean())
    layer = _layer(tokens.mlp, expert_of, origin, compensated=config.mean_compensation)
    layer.router = _router(layer, expert_of, tokens, config, k=k).to(layer.shares.device)
    used = layer.usage(torch.cat([layer.router(x) for x in tokens.inputs.split(BLOCK)]))
    layer.shares.copy_(used / len(tokens.inputs))
    return layer


def _layer(mlp: nn.Module, expert_of: np.ndarray, origin: Origin, *, compensated: bool) -> MoeMlp:
    """The experts of ``mlp``; all of them together are the MLP, compensated or not."""
    count = int(expert_of.max()) + 1
    neurons = [np.flatnonzero(expert_of == expert) for expert in range(count)]
    readout, shift = Readout(), None
    if compensated:  # an expert that a token does not use gives its mean output W2_e mu_e
        weight = mlp.fc2.weight.double()
        shift = torch.stack([weight[:, ids] @ origin.mean[ids] for ids in neurons])
        readout = Readout(shift=-shift)
    layer = MoeMlp(mlp, nn.Identity(), neurons, np.ones(count), readout)
    if shift is not None:
        layer.fc2.bias += shift.sum(0).to(layer.fc2.bias)
    layer.origin = origin
    return layer.to(mlp.fc1.weight.device)


def _router(
    layer: MoeMlp, expert_of: np.ndarray, tokens: LayerTokens, config: MoeficationConfig, *, k: int
) -> nn.Module:
    centres = expert_centres(layer.fc1.weight, expert_of)
    if config.router == "centre":
        return CentreRouter(centres, k=k)
    if config.router == "random":
        even = torch.full((layer.n_experts,), k / layer.n_experts)
        return RandomRouter(even, dim=layer.fc1.in_features, k=k, seed=config.seed)
    truth = GroundTruthRouter(layer, layer.origin, k=k).to(centres.device)
    if config.router == "oracle":
        return truth
    scores = truth.scores(tokens.inputs)
    if config.router == "constant":
        return ConstantRouter(scores.mean(0).topk(k).indices.sort().values.tolist())
    facts = {"image": tokens.image, "k": k, "seed": config.seed}
    return train_router(centres, tokens.inputs, scores, **facts).router
