"""Sparse Upcycling: every second MLP becomes experts that are copies of it, behind a new router.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
arXiv:2212.05055. It is made to be trained on. Published for vision: Expert Choice, capacity 2, 32
experts, weights renormalised per token. A capacity below 1, which saves MACs, is a port.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from moee_analysis.baselines.common import exchange
from moee_analysis.baselines.common import sparse_moe_layer as sparse
from moee_analysis.baselines.common.exchange import Store
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count

CAPACITY = 2.0  # of Expert Choice, where nothing else decides it
SPREAD = 0.02  # standard deviation of the router's first weights


@dataclass(frozen=True)
class SparseUpcyclingConfig:
    """How a model is upcycled.

    - ``router``: ``expert_choice``, every expert takes tokens of an image; or ``top_k``, every
      token takes ``k`` experts.
    - ``capacity``: with Expert Choice every expert takes capacity x tokens / experts of an image's
      tokens; None: 2, or what ``macs_reduction`` allows.
    - ``renormalise``: whether the weights of a token's experts sum to 1. Else outputs are scaled by
      untrained gates.
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
    layers: tuple[int, ...] | None = None
    seed: int = 0
    macs_reduction: float | None = None

    def __post_init__(self) -> None:
        exchange.check_settings(self)
        if self.router == "top_k" and self.k > self.experts:
            raise MoeeError(f"k of at most {self.experts} experts", str(self.k), "choose fewer")
        budget = self.macs_reduction is not None or self.capacity is not None
        if budget and self.router == "top_k":
            raise MoeeError(
                "router='expert_choice' with a capacity, or where MACs are to be saved",
                f"'top_k', whose tokens have {self.k} whole MLPs each",
                "plain upcycling never reduces MACs: choose Expert Choice, or neither",
            )
        if self.macs_reduction is not None and self.capacity is not None:
            raise MoeeError("a capacity or a MACs reduction", "both", "leave one of them out")


def convert(
    dense: nn.Module, images: ImageSet, config: SparseUpcyclingConfig, *, store: Store = None
) -> nn.Module:
    """Upcycle a copy of ``dense``; neither ``images`` nor ``store`` are looked at.

    With renormalised weights the model computes what the dense one does, but for tokens without an
    expert, which get zeros from the layer.

    Raises ``MoeeError``: no MLPs, layers that are not there, a budget that cannot be met.
    """
    sites = exchange.sites_at(find_mlps(dense), config.layers, first=1, step=2)
    capacities = zip(sites, _find_capacities(dense, sites, config), strict=True)
    return exchange.replace_mlps(dense, capacities, partial(_make_layer, config))


def _find_capacities(
    dense: nn.Module, sites: list[MlpSite], config: SparseUpcyclingConfig
) -> list[float | None]:
    """Capacity at every site: that of ``config``, or what its budget allows."""
    saved, experts = config.macs_reduction, config.experts
    if saved is None:
        return [config.capacity] * len(sites)
    counted, tokens = count(dense), [tokens for _, tokens in exchange.find_tokens(dense, sites)]
    each = [counted.by_module[site.name] for site in sites]
    costs = [experts * macs / number for macs, number in zip(each, tokens, strict=True)]
    fixed = counted.replacing({site.name: experts * site.dim for site in sites})
    counts = exchange.fill_budget(saved, costs, tokens, dense=counted.total, fixed=fixed)
    return [taken * experts / number for taken, number in zip(counts, tokens, strict=True)]


def _make_layer(
    config: SparseUpcyclingConfig, site: MlpSite, capacity: float | None, mlp: nn.Module
) -> sparse.SparseMlp:
    generator = torch.Generator().manual_seed(1000 * config.seed + site.index)
    weight = SPREAD * torch.randn(config.experts, site.dim, generator=generator)
    if config.router == "top_k":
        kind = partial(sparse.TopKRouter, k=config.k)
    else:
        kind = partial(sparse.ExpertChoiceRouter, capacity=capacity or CAPACITY)
    router = kind(sparse.Gate(weight), renormalise=config.renormalise)
    return sparse.SparseMlp(
        router, exchange.ExpertMlps([mlp] * config.experts, mlp.act, drop=mlp.drop1.p)
    )
