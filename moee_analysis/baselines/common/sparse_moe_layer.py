"""Layers whose experts compute the tokens that a router with gates gives them, and no others.

Source: Komatsuzaki et al., "Sparse Upcycling", arXiv:2212.05055, and those of
``sparse_routers``.
"""

from __future__ import annotations

import torch
from torch import nn

from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.sparse_routers import ExpertChoiceRouter, Routed, TopKRouter
from moee_analysis.models.macs import tokens_of


class SparseMlp(nn.Module):
    """Experts with weights of their own, in the place of an MLP.

    A token's output is the sum of those of its experts, by the router's weights; a token without
    an expert gets zeros.

    Parameters
    ----------
    router
        Tokens (images, ..., dim) -> ``Routed``.
    experts
        As many as the router knows.
    """

    def __init__(self, router: TopKRouter | ExpertChoiceRouter, experts: ExpertMlps) -> None:
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
        made = self.experts.in_turn(tokens[routed.tokens], counts)
        made = made * routed.weights[:, None].to(made.dtype)
        output = made.new_zeros(len(tokens), made.shape[1]).index_add(0, routed.tokens, made)
        return output.reshape(*x.shape[:-1], made.shape[1])

    def usage(self, routed: Routed) -> torch.Tensor:
        """Number of tokens that each expert computes, float64 (experts,)."""
        return torch.bincount(routed.experts, minlength=self.n_experts).double()

    def random_router(self, seed: int = 0) -> nn.Module:
        """Return a router by which only *which* experts and tokens meet is left to chance.

        As many pairs, the same weights and the same MACs; the draw is a pseudo-random function of
        the tokens' content and the seed.
        """
        return self.router.random(seed)

    def constant_router(self) -> nn.Module:
        """Return a router that does not look at the tokens to choose, at the same MACs.

        All tokens have the same experts; where experts choose, each has the tokens of the same
        places in all images. The weights are those that the router gives.
        """
        return self.router.constant()
