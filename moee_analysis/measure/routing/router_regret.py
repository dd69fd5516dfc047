"""What a router costs beside the best one possible, token by token, with the same experts."""

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.clusters_to_router import Partition, metric_root
from moee_analysis.extraction.cluster.sample_tokens import sample_tokens
from moee_analysis.extraction.merging import recorded_model
from moee_analysis.extraction.record.accumulate import Accumulator, Sums, accumulate
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.inputs import batches_of, check_any
from moee_analysis.measure.routing.routes import Routers
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.moe.layer import MoeMlp, moe_layers
from moee_analysis.moe.routers import (
    ConstantRouter,
    OracleRouter,
    RandomRouter,
    TokenKindRouter,
    beside_leading,
    prefix_experts,
)
from moee_analysis.utils.checks import seed_number

Choices = Mapping[str, Routers]
"""Routers by name."""


def router_choices(
    run: Extraction, images: ImageSet, *, store: str | Path, seed: int = 0
) -> dict[str, Routers]:
    """Return other routers to the experts of a run, by name and by layer.

    ``cosine`` and ``nearest``, one of them the run's own, the other to the means of the tokens that
    this routes; ``random``, as often as the calibration; ``constant``, to the expert of the most
    tokens; ``oracle``. Leading tokens keep experts of their own, and a layer with a single other
    expert is left out. ``images`` are those of the calibration; ``store`` holds their tokens.
    """
    seed_number(seed)
    recorded, config = recorded_model(run), run.config
    calibration = calibration_tokens(recorded, images, config, root=Path(store))
    routed = moe_layers(run.model).items()
    layers = {index: each for index, each in routed if each.n_experts - prefix_experts(each) > 1}
    sites = {site: layers[site.index] for site in calibration.sites if site.index in layers}
    sums = [_MeanInputs(s, layer, hash_weights(_copy_router(layer))) for s, layer in sites.items()]
    means = dict(accumulate(calibration, sums, label="mean inputs as routed"))
    leading = {site.name: _count_leading(layer) for site, layer in sites.items()}
    choices: dict[str, dict[int, nn.Module]] = {}
    for draw in sample_tokens(calibration, config, leading, hidden=False):
        site, layer, centres = draw.site, layers[draw.site.index], means[draw.site]
        root, shares = metric_root(draw, config), layer.shares[prefix_experts(layer) :].cpu()
        routers = {
            "cosine": Partition(centres=centres).router(),
            "nearest": Partition(centres=centres @ root.T, root=root).router(),
            "random": RandomRouter(shares, dim=site.dim, seed=1000 * seed + site.index),
            "constant": ConstantRouter(int(shares.argmax())),
            "oracle": OracleRouter(draw.mlp, layer),
        }
        routers[config.router] = _copy_router(layer)
        for name, router in routers.items():
            choices.setdefault(name, {})[site.index] = beside_leading(router, layer)
    return choices


def rerouted(run: Extraction, routers: Routers) -> nn.Module:
    """Copy the run's model and give its layers other routers, by layer index."""
    model = copy.deepcopy(run.model)
    for index, layer in moe_layers(model).items():
        if index in routers:
            layer.router = copy.deepcopy(routers[index]).to(layer.shares.device)
    return model


def router_regret(
    run: Extraction, images: ImageSet, routers: Choices, *, batch_size: int | None = None
) -> pd.DataFrame:
    """Error of the layers' outputs under each router, beyond that of the best expert for a token.

    Every layer gets the inputs of the dense model, of the tokens that are left where some merge.
    Counted are the tokens that are routed, not those with experts by position. ``routers`` are such
    as :func:`router_choices` gives.

    A row per layer and router: ``layer``, ``router``, ``error`` (mean squared error of the output
    over the variance of the dense one), ``regret`` (``error`` less that of the best expert for
    every token), ``best`` (share of tokens that get an expert of no larger error), ``experts``.
    Raises MoeeError: no images, or no layer of the run for which all routers are given.
    """
    check_any(images)
    dense, routed = recorded_model(run), moe_layers(run.model)
    layers = {i: layer for i, layer in routed.items() if all(i in own for own in routers.values())}
    if not routers or not layers:
        found = ", ".join(f"{name} for {sorted(of)}" for name, of in routers.items()) or "none"
        hint = "take those of measure.router_choices, from a run with several experts a layer"
        raise MoeeError(f"routers for some of the routed layers {sorted(routed)}", found, hint)
    sites = {site.index: site for site in find_mlps(dense)}
    mlps = {index: sites[index].module(dense) for index in layers}
    oracles = {index: OracleRouter(mlps[index], layer) for index, layer in layers.items()}
    sums, inputs = {index: Counter() for index in layers}, {}
    with evaluating(dense), watch(mlps, inputs.__setitem__):
        for x in batches_of(dense, images, batch_size, label="routers"):
            dense(x)
            for index, layer in layers.items():
                tokens = inputs[index].reshape(len(x), -1, inputs[index].shape[-1])
                own = {name: by_layer[index] for name, by_layer in routers.items()}
                _add_errors(sums[index], tokens, oracles[index], layer, own)
    rows = []
    for index, own in sums.items():
        mean = own["outputs"] / own["tokens"]
        variance = own["squares"] - own["tokens"] * float(mean.square().sum())
        scale = variance or math.nan  # outputs that never change leave no share to tell
        for name in routers:
            error, best = own["error", name], own["best", name] / own["tokens"]
            row = {"layer": index, "router": name, "error": error / scale}
            row |= {"regret": (error - own["least"]) / scale, "best": best}
            rows.append(row | {"experts": oracles[index].n_experts})
    return add_caption(
        pd.DataFrame(rows),
        f"{len(images)} images, routed tokens only, each layer on the inputs of the dense model; "
        "errors are relative to the variance of the dense outputs.",
    )


def _add_errors(
    sums: Counter, x: torch.Tensor, oracle: OracleRouter, layer: MoeMlp, routers: dict
) -> None:
    """Add the squared errors of the routed ones of the tokens ``x`` [images, tokens, dim]."""
    leading = _count_leading(layer)
    y = oracle.wanted(x[:, leading:]).double()
    errors = oracle.errors(x[:, leading:]).double()
    least = errors.min(dim=1).values
    sums["tokens"] += len(errors)
    sums["outputs"] += y.sum(dim=(0, 1))
    sums["squares"] += float(y.square().sum())
    sums["least"] += float(least.sum())
    for name, router in routers.items():
        chosen = router.to(x.device)(x).reshape(*x.shape[:2])[:, leading:].reshape(-1, 1)
        own = errors.gather(1, chosen - prefix_experts(layer))[:, 0]
        sums["error", name] += float(own.sum())
        sums["best", name] += int((own == least).sum())


def _count_leading(layer: MoeMlp) -> int:
    return len(layer.router.prefix) if isinstance(layer.router, TokenKindRouter) else 0


def _copy_router(layer: MoeMlp) -> nn.Module:
    """A copy of the router of the tokens that have no expert by position."""
    router = layer.router.inner if isinstance(layer.router, TokenKindRouter) else layer.router
    return copy.deepcopy(router).cpu()


@dataclass(frozen=True)
class _MeanInputs(Accumulator):
    """Sums of the inputs of the tokens that each expert of a routed layer gets."""

    site: MlpSite
    layer: MoeMlp = field(compare=False)
    router: str  # a hash of it
    gradients: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        experts = self.layer.n_experts - prefix_experts(self.layer)
        return {"inputs": (experts, self.site.dim), "tokens": (experts,)}

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        rows = np.flatnonzero(layer.sample.position >= _count_leading(self.layer))
        inputs = torch.from_numpy(layer.sample.inputs[rows].astype(np.float32))
        expert = _copy_router(self.layer)(inputs)[:, 0]
        sums["inputs"].index_add_(0, expert, inputs.double())
        sums["tokens"] += expert.bincount(minlength=len(sums["tokens"]))

    def compute(self, sums: Sums) -> np.ndarray:
        """Mean inputs, float32 (experts, dim)."""
        return (sums["inputs"] / sums["tokens"].clamp_min(1)[:, None]).float().numpy()
