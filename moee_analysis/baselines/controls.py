"""Controls: what a claim about routing has to beat. Leading tokens keep experts of their own."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.baselines.common.exchange import Store
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.sample_tokens import pick_inputs
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.merging import recorded_model
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.macs import count
from moee_analysis.models.merge_costs import RandomCosts
from moee_analysis.models.merging import merging_blocks
from moee_analysis.moe import routers
from moee_analysis.moe.layer import MoeMlp, all_mlps, expert_layers, macs_as_used, moe_layers


def with_random_centres(config: ExtractConfig) -> ExtractConfig:
    """Return ``config`` with random tokens for centres: what the clusters of a model must beat.

    All tokens are routed to ``clustering.count`` centres; all else follows the same rules.
    """
    clustering = replace(config.resolved().clustering, method="random", reduce="none")
    return replace(config, clustering=clustering, noise="reroute")


def randomly_routed(run: Extraction | nn.Module, *, seed: int = 0) -> nn.Module:
    """Copy the model and let chance route its tokens, using experts as often as before.

    In layers of slots tokens change places in what the router says of them.
    """
    model = _copy_model(run)
    for index, layer in moe_layers(model).items():
        patches = layer.shares[routers.prefix_experts(layer) :]
        inner = getattr(layer.router, "inner", None)
        if len(patches) == 1 and isinstance(inner, routers.ConstantRouter):
            continue  # only leading tokens have experts of their own
        facts = {"k": round(layer.shares.sum().item()), "seed": 1000 * seed + index}
        drawn = routers.RandomRouter(patches, dim=layer.fc1.in_features, **facts)
        layer.router = routers.beside_leading(drawn, layer).to(layer.shares.device)
    for layer in _own_expert_layers(model):
        layer.router = layer.random_router(seed=seed)
    return model


def randomly_merged(run: Extraction | nn.Module, *, seed: int = 0) -> nn.Module:
    """Copy the model and let chance pair its tokens, as many of them in each block as before.

    Raises MoeeError: a model whose tokens do not merge.
    """
    model = _copy_model(run)
    if (blocks := merging_blocks(model)) is None:
        hint = 'extract with merging="budget"'
        raise MoeeError("a model whose tokens merge", type(model).__name__, hint)
    for number, block in enumerate(blocks):
        block.costs = RandomCosts(model.embed_dim, seed=1000 * seed + number)
    return model


def constantly_routed(run: Extraction | nn.Module) -> nn.Module:
    """Copy the model and send all tokens to the same experts: those that most tokens used.

    In layers of slots all tokens are mixed evenly.
    """
    model = _copy_model(run)
    for layer in moe_layers(model).values():
        shares = layer.shares[routers.prefix_experts(layer) :]
        k = max(1, round(shares.sum().item()))
        constant = routers.ConstantRouter(shares.topk(k).indices)
        layer.router = routers.beside_leading(constant, layer).to(layer.shares.device)
    for layer in _own_expert_layers(model):
        layer.router = layer.constant_router()
    return model


def oracle_routed(run: Extraction | nn.Module, dense: nn.Module) -> nn.Module:
    """Copy the model and send each token to the expert whose output is nearest to the dense MLP's.

    Layers with several experts a token keep their routers.
    """
    model, mlps = _copy_model(run), list(all_mlps(dense).values())
    for index, layer in moe_layers(model).items():
        several = layer.n_experts - routers.prefix_experts(layer) > 1
        if several and round(layer.shares.sum().item()) == 1:
            layer.router = routers.beside_leading(routers.OracleRouter(mlps[index], layer), layer)
    return model


def _copy_model(run: Extraction | nn.Module) -> nn.Module:
    return copy.deepcopy(run if isinstance(run, nn.Module) else run.model)


def _own_expert_layers(model: nn.Module) -> list[nn.Module]:
    """Layers whose experts are no parts of a dense MLP."""
    return [layer for layer in expert_layers(model).values() if not isinstance(layer, MoeMlp)]


def statically_pruned(run: Extraction, images: ImageSet, *, store: Store = None) -> Extraction:
    """Prune the same layers to the same MACs by the same rule, with one expert for all tokens.

    The MACs are the run's budget, or what it came to on its calibration ``images``.

    Raises ``MoeeError``: the run left every layer dense.
    """
    converted = tuple(layer.index for layer in run.layers if layer.converted)
    if not converted:
        hint = "compare with the dense model, which is the same"
        raise MoeeError("a run with converted layers", "a run that left every layer dense", hint)
    reduction = run.config.macs_reduction
    if reduction is None:
        reduction = 1 - macs_as_used(run.model) / count(run.dense()).total
    bounds = {"macs_reduction": reduction, "variance_kept": None}
    if reduction <= 0:  # the routers cost more than the experts save
        bounds = {"macs_reduction": None, "variance_kept": 1.0}
    config = replace(run.config, experts="one", layers=converted, **bounds)
    return extract(run.dense(), images, config, store=store)


def random_centres(
    run: Extraction, images: ImageSet, *, store: str | Path, seed: int = 0
) -> dict[int, routers.CosineRouter]:
    """Routers with inputs of random calibration tokens for centres, as many as the run's experts.

    Whatever these show too, the clusters did not cause. By layer index, for ``measure.routes``.
    ``images`` are the run's own calibration images; the ``store`` keeps the sampled tokens.
    """
    calibration = calibration_tokens(recorded_model(run), images, run.config, root=Path(store))
    names, layers, rows = {r.index: r.name for r in run.layers}, moe_layers(run.model), {}
    for index, layer in layers.items():
        tokens = calibration.whole.kept[names[index]] * len(calibration.images)
        rng = np.random.default_rng([seed, index])
        rows[names[index]] = np.sort(rng.choice(tokens, size=layer.n_experts, replace=False))
    centres = pick_inputs(calibration, rows)
    return {
        index: routers.CosineRouter(torch.from_numpy(centres[names[index]]).to(layer.shares.device))
        for index, layer in layers.items()
    }
