"""Sparse Upcycling: every second MLP becomes experts that are copies of it, behind a new router.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
arXiv:2212.05055. It starts where the dense model stands, or a little below, and is made to be
trained on. Published for vision: Expert Choice with capacity 2, 32 experts, weights renormalised
per token. The original never saves MACs; a capacity below 1, which does, is this project's port.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from moee_analysis.baselines.common.replace_mlps import (
    ExpertMlps,
    check_shared,
    fill_budget,
    find_tokens,
    replace_mlps,
    sites_at,
)
from moee_analysis.baselines.common.sparse_moe_layer import (
    ExpertChoiceRouter,
    Gate,
    SparseMlp,
    TopKRouter,
)
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.utils import checks

CAPACITY = 2.0  # of Expert Choice, where nothing else decides it
SPREAD = 0.02  # standard deviation of the router's first weights


@dataclass(frozen=True)
class SparseUpcyclingConfig:
    """How a model is upcycled.

    - ``router``: ``expert_choice``, every expert takes tokens of an image; or ``top_k``, every
      token takes ``k`` experts.
    - ``capacity``: with Expert Choice every expert takes capacity x tokens / experts of an image's
      tokens; None: 2, or what ``macs_reduction`` allows. With ``top_k`` an expert drops tokens
      beyond capacity x k x tokens / experts; None: it drops none.
    - ``renormalise``: whether the weights of a token's experts sum to 1. Without it outputs are
      scaled by gates that were never trained, and the model starts far from the dense one.
    - ``noise``: standard deviation of noise on the logits in training, in units of 1 / experts
      (1 in V-MoE).
    - ``layers``: MLPs to exchange, counted from 0; None: every second one, 1, 3, 5, ...
    - ``macs_reduction``: share of all MACs of the dense model to save, by capacities as alike as
      possible; only with Expert Choice.

    Raises ``MoeeError``: a setting out of its range, or a saving that ``top_k`` cannot make.
    """

    experts: int = 8
    router: Literal["expert_choice", "top_k"] = "expert_choice"
    k: int = 2
    capacity: float | None = None
    renormalise: bool = True
    noise: float = 0.0
    layers: tuple[int, ...] | None = None
    seed: int = 0
    macs_reduction: float | None = None

    def __post_init__(self) -> None:
        check_shared(self)
        checks.whole_number("experts", self.experts)
        checks.whole_number("k", self.k)
        if self.router == "top_k" and self.k > self.experts:
            raise MoeeError(f"k of at most {self.experts} experts", str(self.k), "choose fewer")
        checks.real_number("noise", self.noise, least=0)
        for name, value in checks.not_none(self, "capacity"):
            checks.real_number(name, value, above=0)
        if self.macs_reduction is not None and self.router == "top_k":
            raise MoeeError(
                "router='expert_choice' where MACs are to be saved",
                f"'top_k', whose tokens have {self.k} whole MLPs each",
                "plain upcycling never reduces MACs: choose Expert Choice, or no budget",
            )
        if self.macs_reduction is not None and self.capacity is not None:
            raise MoeeError("a capacity or a MACs reduction", "both", "leave one of them out")


def convert(
    dense: nn.Module,
    images: ImageSet,
    config: SparseUpcyclingConfig,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Upcycle a copy of ``dense``; neither ``images`` nor ``store`` are looked at.

    With renormalised weights and a router by which every token gets an expert, the model computes
    what the dense one does. Tokens that Expert Choice leaves to no expert, or that are dropped, get
    zeros from the layer.

    Raises ``MoeeError``: no MLPs, layers that are not there, a budget that cannot be met.
    """
    sites = sites_at(find_mlps(dense), config.layers, first=1, step=2)
    own = zip(sites, _find_capacities(dense, sites, config), strict=True)
    return replace_mlps(dense, {site: partial(_make_layer, site, config, c) for site, c in own})


def _find_capacities(
    dense: nn.Module, sites: list[MlpSite], config: SparseUpcyclingConfig
) -> list[float | None]:
    """Capacity at every site: that of ``config``, or what its budget allows."""
    if config.macs_reduction is None:
        return [config.capacity] * len(sites)
    counted, tokens = count(dense), [tokens for _, tokens in find_tokens(dense, sites)]
    costs = [
        config.experts * counted.by_module[site.name] / number
        for site, number in zip(sites, tokens, strict=True)
    ]
    fixed = counted.replacing({site.name: config.experts * site.dim for site in sites})
    counts = fill_budget(config.macs_reduction, costs, tokens, dense=counted.total, fixed=fixed)
    return [taken * config.experts / n for taken, n in zip(counts, tokens, strict=True)]


def _make_layer(
    site: MlpSite, config: SparseUpcyclingConfig, capacity: float | None, mlp: nn.Module
) -> SparseMlp:
    generator = torch.Generator().manual_seed(1000 * config.seed + site.index)
    weight = SPREAD * torch.randn(config.experts, site.dim, generator=generator)
    gate = Gate(weight, noise=config.noise / config.experts)
    if config.router == "top_k":
        kind = partial(TopKRouter, k=config.k, capacity=capacity)
    else:
        kind = partial(ExpertChoiceRouter, capacity=capacity or CAPACITY)
    router = kind(gate, renormalise=config.renormalise)
    return SparseMlp(router, ExpertMlps([mlp] * config.experts, mlp.act, drop=mlp.drop1.p))
