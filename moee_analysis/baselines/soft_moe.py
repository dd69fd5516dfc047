"""Soft MoE: in the second half of the layers, experts see slots, each a mixture of all tokens.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951. The original
is trained from scratch, without a class token; here a leading token is mixed like all others. Much
is lost until the model is trained: at first every slot is almost the mean of all tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn.init import trunc_normal_

from moee_analysis.baselines.common import exchange
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.utils.checks import check_settings

SPREAD = 0.02  # standard deviation of the first weights of timm's linear layers


@dataclass(frozen=True)
class SoftMoeConfig:
    """How a model becomes a Soft MoE.

    - ``slots``: of each expert; None: tokens / experts, rounded, or what ``macs_reduction`` allows.
    - ``initialisation``: experts are copies of the dense MLP (``upcycled``), or drawn anew as timm
      draws its MLPs (``fresh``).
    - ``drop``: rate of dropout of hidden activations and outputs; None: that of the dense MLP.
    - ``layers``: MLPs to exchange, counted from 0; None: the second half.
    - ``macs_reduction``: share of all MACs of the dense model to save, by fewer slots, in layers as
      alike as possible.

    Raises ``MoeeError``: a setting out of its range.
    """

    experts: int = 8
    slots: int | None = None
    initialisation: Literal["upcycled", "fresh"] = "upcycled"
    drop: float | None = None
    layers: tuple[int, ...] | None = None
    seed: int = 0
    macs_reduction: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.slots is not None and self.macs_reduction is not None:
            raise MoeeError("slots or a MACs reduction", "both", "leave one of them out")


def convert(
    dense: nn.Module, images: ImageSet, config: SoftMoeConfig, *, store: exchange.Store = None
) -> nn.Module:
    """Make a Soft MoE of a copy of ``dense``; neither ``images`` nor ``store`` are looked at.

    Raises ``MoeeError``: no MLPs, layers that are not there, a budget that cannot be met.
    """
    mlps = find_mlps(dense)
    sites = exchange.sites_at(mlps, config.layers, first=len(mlps) // 2)
    slots = zip(sites, _count_slots(dense, sites, config), strict=True)
    return exchange.replace_mlps(dense, slots, partial(_make_layer, config))


def _count_slots(dense: nn.Module, sites: list[MlpSite], config: SoftMoeConfig) -> list[int]:
    """Slots of each expert in every layer."""
    if config.slots is not None:
        return [config.slots] * len(sites)
    saved, seen = config.macs_reduction, exchange.find_tokens(dense, sites)
    if saved is None:
        return [exchange.per_expert(tokens, config.experts) for _, tokens in seen]
    counted, costs = count(dense), []
    for site, (groups, tokens) in zip(sites, seen, strict=True):
        outputs = site.module(dense).fc2.out_features
        mixing = groups * tokens * (2 * site.dim + outputs)  # logits, dispatch and combination
        costs.append(config.experts * (counted.by_module[site.name] / tokens + mixing))
    fixed = counted.replacing({site.name: 0 for site in sites})
    most = [tokens for _, tokens in seen]
    return exchange.fill_budget(saved, costs, most, dense=counted.total, fixed=fixed)


def _make_layer(config: SoftMoeConfig, site: MlpSite, slots: int, mlp: nn.Module) -> SlotMlp:
    seed = 1000 * config.seed + site.index
    drop = mlp.drop1.p if config.drop is None else config.drop
    experts = exchange.ExpertMlps([mlp] * config.experts, mlp.act, drop=drop)
    if config.initialisation == "fresh":  # every expert by itself, as timm draws linear layers
        generator = torch.Generator().manual_seed(seed)
        for weight in (experts.fc1_weight, experts.fc2_weight):
            first = trunc_normal_(torch.empty(weight.shape), std=SPREAD, generator=generator)
            weight.data.copy_(first)
        experts.fc1_bias.data.zero_()
        experts.fc2_bias.data.zero_()
    router = SoftRouter(site.dim, config.experts, slots=slots, seed=seed)
    return SlotMlp(router, [experts], slots=slots)
