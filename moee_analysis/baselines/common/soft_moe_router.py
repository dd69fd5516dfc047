"""The router of Soft MoE: every slot is a mixture of all tokens, every token one of all slots.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951,
algorithms 1 and 2.
"""

from __future__ import annotations

import torch
from torch import nn

from moee_analysis.baselines.common.soft_moe_layer import Mixing

EPSILON = 1e-6  # added to squared lengths


class SoftRouter(nn.Module):
    """Dispatch and combine by the cosines of tokens and learned slot embeddings.

    ``embeddings`` (dim, experts, slots) and ``scale``, by which the cosines are multiplied, are
    learned. A softmax of the logits over the tokens dispatches, one over all slots combines.

    Parameters
    ----------
    slots
        Slots of each expert.
    noise
        Standard deviation of what is added to the logits in training.
    seed
        Of the embeddings, which are drawn from N(0, 1 / dim).
    """

    def __init__(
        self, dim: int, experts: int, *, slots: int = 1, noise: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(dim, experts, slots, generator=generator)
        self.embeddings = nn.Parameter(drawn / dim**0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.noise = noise

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the mixing of ``tokens`` (images, tokens, dim)."""
        logits = self.logits(tokens)
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return Mixing(logits.softmax(dim=1), logits.softmax(dim=2))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scaled cosines of tokens and slots, (images, tokens, experts x slots)."""
        embeddings = _unit(self.embeddings.flatten(1), dim=0)
        # the scale goes to the smaller factor: fewer products, the same logits
        if tokens.numel() < embeddings.numel():
            return (self.scale * _unit(tokens, dim=-1)) @ embeddings
        return _unit(tokens, dim=-1) @ (self.scale * embeddings)


def _unit(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Vectors along ``dim`` divided by their length."""
    return x * (x.square().sum(dim=dim, keepdim=True) + EPSILON).rsqrt()
