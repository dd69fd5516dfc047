"""Sparse Upcycling: every second MLP becomes experts that are copies of it, behind a new router.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
arXiv:2212.05055. It is made to be trained on. Published for vision: Expert Choice, capacity 2, 32
experts, weights renormalised per token. A capacity below 1, which saves MACs, is a port.

Sources of the routers: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts",
arXiv:2106.05974 (top-k, and the loss that balances it); Zhou et al., "Mixture-of-Experts with
Expert Choice Routing", arXiv:2202.09368. Images are routed by themselves, whatever else is in the
batch.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from moee_analysis.baselines.common import exchange
from moee_analysis.baselines.common.exchange import ExpertMlps, Store, per_expert
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count, tokens_of
from moee_analysis.utils.checks import check_settings

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
        check_settings(self)
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
) -> "SparseMlp":
    generator = torch.Generator().manual_seed(1000 * config.seed + site.index)
    weight = SPREAD * torch.randn(config.experts, site.dim, generator=generator)
    if config.router == "top_k":
        kind = partial(TopKRouter, k=config.k)
    else:
        kind = partial(ExpertChoiceRouter, capacity=capacity or CAPACITY)
    router = kind(Gate(weight), renormalise=config.renormalise)
    return SparseMlp(router, ExpertMlps([mlp] * config.experts, mlp.act, drop=mlp.drop1.p))


Scores = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (images, tokens, dim) -> scores (images, tokens, experts)."""


class Routed(NamedTuple):
    """Pairs of an expert and a token that it computes, those of an expert beside each other.

    ``experts`` and ``tokens`` of the batch are ids, int64 (pairs,), ``weights`` (pairs,) factors of
    the outputs. The router's ``logits`` are (images, tokens, experts).
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor


class Gate(nn.Module):
    """One product of a token with each expert's row of ``weight`` (experts, dim)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``tokens`` (images, tokens, dim), also under autocast precise."""
        return linear(tokens, self.weight).to(self.weight.dtype)


class TopKRouter(nn.Module):
    """The k experts of the largest gates, a softmax of the logits, for every token.

    To ``renormalise``: the weights of a token's k experts are made to sum to 1. With k = 1 the
    router then learns nothing from the outputs: all weights are 1.
    """

    def __init__(self, gate: Gate, *, k: int = 2, renormalise: bool = True) -> None:
        super().__init__()
        self.gate, self.k, self.renormalise = gate, k, renormalise
        self.preference: Scores | None = None  # see `prefer`

    def forward(self, x: torch.Tensor) -> Routed:
        """Route the tokens of ``x`` (images, ..., dim)."""
        tokens = x.flatten(1, -2)
        logits = self.gate(tokens)
        weights, experts = logits.softmax(dim=-1).topk(self.k)
        if self.preference is not None:
            experts = self.preference(tokens).topk(self.k).indices
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        chosen, weights = experts.flatten()[order], weights.flatten()[order]
        return Routed(chosen, order // self.k, weights, logits)

    def constant_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores by which all tokens have the first k experts."""
        order = torch.arange(len(self.gate.weight), device=tokens.device)
        return -order.expand(*tokens.shape[:2], -1)


class ExpertChoiceRouter(nn.Module):
    """For every expert the tokens of an image whose gates for it are largest.

    Every expert takes ``capacity`` n / experts of an image's n tokens, at least one. To
    ``renormalise``: the weights of all experts that take a token are made to sum to 1.
    """

    def __init__(self, gate: Gate, *, capacity: float = 2.0, renormalise: bool = True) -> None:
        super().__init__()
        self.gate, self.capacity, self.renormalise = gate, capacity, renormalise
        self.preference: Scores | None = None  # see `prefer`

    def forward(self, x: torch.Tensor) -> Routed:
        """Route the tokens of ``x`` (images, ..., dim)."""
        tokens = x.flatten(1, -2)
        logits = self.gate(tokens)
        images, count, n_experts = logits.shape
        taken = min(count, per_expert(count, n_experts, self.capacity))
        weights, ids = logits.softmax(dim=-1).mT.topk(taken)  # (images, experts, taken)
        if self.preference is not None:
            ids = self.preference(tokens).mT.topk(taken).indices
        first = count * torch.arange(images, device=x.device)[:, None, None]
        ids = (first + ids).transpose(0, 1).flatten()  # expert by expert, of all images
        weights = weights.transpose(0, 1).flatten()
        if self.renormalise:
            sums = weights.new_zeros(images * count).index_add(0, ids, weights)
            weights = weights / sums[ids]
        experts = torch.arange(n_experts, device=x.device).repeat_interleave(images * taken)
        return Routed(experts, ids, weights, logits)

    def constant_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores by which the first tokens are the first expert's, the next ones the next one's.

        After the last token they are dealt again from the first.
        """
        count, n_experts = tokens.shape[1], len(self.gate.weight)
        share = per_expert(count, n_experts, self.capacity)
        places = torch.arange(count, device=tokens.device)[:, None]
        starts = share * torch.arange(n_experts, device=tokens.device)
        return -((places - starts) % count).expand(len(tokens), -1, -1)


Router = TopKRouter | ExpertChoiceRouter


def prefer(router: Router, preference: Scores) -> Router:
    """Copy a router, to choose by other scores; the weights remain those of the largest gates."""
    copied = copy.deepcopy(router)
    copied.preference = preference
    return copied.to(router.gate.weight.device)


class RandomScores(nn.Module):
    """Scores that are a pseudo-random function of a token's content and the seed."""

    def __init__(self, dim: int, n_experts: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(dim, generator=generator)
        rates = 100 + 900 * torch.rand(n_experts, generator=generator)
        self.register_buffer("direction", direction.double(), persistent=False)
        self.register_buffer("rates", rates.double(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scores in [0, 1) of ``tokens`` (images, tokens, dim) for every expert."""
        # sums, where a product of matrices would be counted among the model's MACs
        spread = (tokens.double() * self.direction).sum(dim=-1, keepdim=True) * self.rates
        return spread - spread.floor()


class SparseMlp(nn.Module):
    """Experts with weights of their own, in the place of an MLP.

    A token's output is the sum of those of its experts, if any, by the router's weights.
    """

    def __init__(self, router: Router, experts: ExpertMlps) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.experts.n_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the tokens of images, (images, ..., dim), to outputs of the same shape."""
        tokens, routed = tokens_of(x), self.router(x)
        counts = torch.bincount(routed.experts, minlength=self.n_experts).tolist()
        outputs = self.experts.in_turn(tokens[routed.tokens], counts)
        outputs = outputs * routed.weights[:, None].to(outputs.dtype)
        sums = outputs.new_zeros(len(tokens), outputs.shape[1])
        sums = sums.index_add(0, routed.tokens, outputs)
        return sums.reshape(*x.shape[:-1], outputs.shape[1])

    def usage(self, routed: Routed) -> torch.Tensor:
        """Number of tokens that each expert computes, float64 (experts,)."""
        return torch.bincount(routed.experts, minlength=self.n_experts).double()

    def random_router(self, seed: int = 0) -> Router:
        """Return a router by which only *which* experts and tokens meet is left to chance."""
        n_experts, dim = self.router.gate.weight.shape
        return prefer(self.router, RandomScores(dim, n_experts, seed=seed))

    def constant_router(self) -> Router:
        """Return a router of the same MACs that does not look at the tokens to choose."""
        return prefer(self.router, self.router.constant_scores)


def importance_loss(logits: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the experts' sums of gates, mean over images.

    ``logits`` are (images, tokens, experts). (V-MoE, appendix A.)
    """
    gates = logits.softmax(dim=-1).sum(dim=-2)
    return (gates.var(dim=-1, correction=0) / gates.mean(dim=-1).square()).mean()


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[dict[TopKRouter, Routed]]:
    """While open, yield what the top-k routers of sparse layers last returned."""
    last: dict[TopKRouter, Routed] = {}
    routers = {m: m for m in model.modules() if isinstance(m, TopKRouter)}
    with watch(routers, last.__setitem__, "outputs"):
        yield last


def balance_loss(routed: Mapping[TopKRouter, Routed]) -> torch.Tensor | float:
    """Sum of the importance losses of top-k routers."""
    return sum(importance_loss(each.logits) for each in routed.values())
