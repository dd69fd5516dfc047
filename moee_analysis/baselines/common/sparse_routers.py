"""Routers with gates: which experts compute which tokens, and how much their outputs count.

Sources: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", arXiv:2106.05974 (top-k);
Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368. Images are routed by
themselves, whatever else is in the batch.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from moee_analysis.baselines.common.capacity import per_expert


class Routed(NamedTuple):
    """Pairs of an expert and a token that it computes, those of an expert beside each other.

    ``experts`` and ``tokens`` are ids, int64 (pairs,); the tokens of the batch are numbered in
    row-major order. ``weights`` (pairs,) are what the outputs count in those of the layer.
    ``logits`` (images, tokens, experts) are the router's, and ``noisy`` what they were with noise:
    the same, but in training.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor
    noisy: torch.Tensor


class Gate(nn.Module):
    """One product of a token with each expert's row of ``weight`` (experts, dim).

    Parameters
    ----------
    noise
        Standard deviation of what is added in training.
    """

    def __init__(self, weight: torch.Tensor, *, noise: float = 0.0) -> None:
        super().__init__()
        self.weight, self.noise = nn.Parameter(weight), noise

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.weight)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of ``tokens`` (images, tokens, dim), without and with noise.

        They have the precision of ``weight``, under autocast too.
        """
        logits = nn.functional.linear(tokens, self.weight).to(self.weight.dtype)
        if not self.training or self.noise == 0:
            return logits, logits
        return logits, logits + self.noise * torch.randn_like(logits)


class TopKRouter(nn.Module):
    """The k experts of the largest gates, for every token.

    Parameters
    ----------
    gate
        What gives the logits; a softmax over the experts makes gates of them, before the top k are
        taken.
    k
        Experts of each token.
    renormalise
        Whether the weights of a token's k experts are made to sum to 1. With k = 1 the router then
        learns nothing from the outputs: all weights are 1.
    capacity
        How many times its even share of an image's pairs an expert can take, k n / experts; others
        are dropped, of all tokens' second choices before any first one, and the last tokens first.
        None: whatever comes.
    preference
        Scores (images, tokens, experts) by which the experts are chosen in place of the gates; the
        weights remain those of the largest gates, in their order.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        k: int = 2,
        renormalise: bool = True,
        capacity: float | None = None,
        preference: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.k, self.renormalise, self.capacity = gate, k, renormalise, capacity
        self.preference = preference

    def forward(self, x: torch.Tensor) -> Routed:
        """Route the tokens of ``x`` (images, ..., dim)."""
        tokens = x.flatten(1, -2)
        logits, noisy = self.gate(tokens)
        weights, experts = noisy.softmax(dim=-1).topk(self.k)
        if self.preference is not None:
            experts = self.preference(tokens).topk(self.k).indices
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        if self.capacity is not None:
            order = order[self._within_capacity(experts).flatten()[order]]
        return Routed(
            experts.flatten()[order], order // self.k, weights.flatten()[order], logits, noisy
        )

    def random(self, seed: int) -> TopKRouter:
        """Return a router like this one, with random experts."""
        dim = self.gate.weight.shape[1]
        return _preferring(self, RandomScores(dim, self.gate.n_experts, seed=seed))

    def constant(self) -> TopKRouter:
        """Return a router like this one, with the first k experts for all tokens."""
        return _preferring(self, FirstExperts(self.gate.n_experts))

    def _within_capacity(self, experts: torch.Tensor) -> torch.Tensor:
        """Which choices (images, tokens, k) do not come too late, bool."""
        images, tokens, k = experts.shape
        most = per_expert(k * tokens, self.gate.n_experts, self.capacity)
        in_order = experts.mT.flatten(1)  # all first choices, then all second ones
        before = nn.functional.one_hot(in_order, self.gate.n_experts).cumsum(dim=1)
        place = before.gather(2, in_order[..., None])
        return (place <= most).view(images, k, tokens).mT


class ExpertChoiceRouter(nn.Module):
    """The tokens of an image whose gates for it are largest, for every expert.

    Parameters
    ----------
    gate
        What gives the logits; a softmax over the experts makes gates of them.
    capacity
        C: every expert takes C n / experts of an image's n tokens, rounded, at least one.
    renormalise
        Whether the weights of all experts that take a token are made to sum to 1.
    preference
        Scores (images, tokens, experts) by which the tokens are chosen in place of the gates; the
        weights remain those of the largest gates, in their order.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        capacity: float = 2.0,
        renormalise: bool = True,
        preference: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.capacity, self.renormalise = gate, capacity, renormalise
        self.preference = preference

    def forward(self, x: torch.Tensor) -> Routed:
        """Route the tokens of ``x`` (images, ..., dim)."""
        tokens = x.flatten(1, -2)
        logits, noisy = self.gate(tokens)
        images, count, n_experts = logits.shape
        taken = min(count, per_expert(count, n_experts, self.capacity))
        weights, ids = noisy.softmax(dim=-1).mT.topk(taken)  # (images, experts, taken)
        if self.preference is not None:
            ids = self.preference(tokens).mT.topk(taken).indices
        first = count * torch.arange(images, device=x.device)[:, None, None]
        ids = (first + ids).transpose(0, 1).flatten()  # expert by expert, of all images
        weights = weights.transpose(0, 1).flatten()
        if self.renormalise:
            sums = weights.new_zeros(images * count).index_add(0, ids, weights)
            weights = weights / sums[ids]
        experts = torch.arange(n_experts, device=x.device).repeat_interleave(images * taken)
        return Routed(experts, ids, weights, logits, noisy)

    def random(self, seed: int) -> ExpertChoiceRouter:
        """Return a router like this one, with random tokens for every expert."""
        dim = self.gate.weight.shape[1]
        return _preferring(self, RandomScores(dim, self.gate.n_experts, seed=seed))

    def constant(self) -> ExpertChoiceRouter:
        """Return a router like this one, with tokens for every expert by their places alone."""
        return _preferring(self, DealtTokens(self.gate.n_experts, self.capacity))


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


class FirstExperts(nn.Module):
    """Scores that fall from the first expert to the last, for all tokens."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of ``tokens`` (images, tokens, dim), a view of those of one token."""
        scores = -torch.arange(self.n_experts, device=tokens.device)
        return scores.expand(*tokens.shape[:2], -1)


class DealtTokens(nn.Module):
    """Scores by which the first tokens are the first expert's, the next ones the next expert's.

    Every expert has its share of the tokens, by ``capacity``; where there are no more tokens, they
    are dealt again from the first.
    """

    def __init__(self, n_experts: int, capacity: float) -> None:
        super().__init__()
        self.n_experts, self.capacity = n_experts, capacity

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of ``tokens`` (images, tokens, dim), a view of those of one image."""
        images, count, _ = tokens.shape
        share = per_expert(count, self.n_experts, self.capacity)
        places = torch.arange(count, device=tokens.device)[:, None]
        starts = share * torch.arange(self.n_experts, device=tokens.device)
        return -((places - starts) % count).expand(images, -1, -1)


def _preferring(router: nn.Module, preference: nn.Module) -> nn.Module:
    """Copy ``router``, which then chooses by ``preference``."""
    copied = copy.deepcopy(router)
    copied.preference = preference.to(router.gate.weight.device)
    return copied
