"""Routers: which expert a token goes to. Each maps tokens (n, dim) to expert ids (n, k)."""

from __future__ import annotations

import torch
from torch import nn


class CosineRouter(nn.Module):
    """Send a token to the expert whose mean input is nearest by cosine, top-1 (MoEE, phase 3).

    ``centres`` (experts, dim) are the raw mean inputs; they are normalised when used.
    """

    def __init__(self, centres: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centres", centres)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of ``tokens`` (n, dim)."""
        scores = tokens @ nn.functional.normalize(self.centres, dim=1).T
        return scores.argmax(dim=1, keepdim=True)

    @property
    def n_experts(self) -> int:
        """Number of experts to choose from."""
        return len(self.centres)

    @property
    def macs(self) -> int:
        """MACs per token: one product with every centre."""
        return self.centres.numel()


class RandomRouter(nn.Module):
    """Send every token to a random expert: the control that a router must beat.

    A token's expert is a pseudo-random function of its content and the seed, so that any pass
    over the same images repeats it. ``shares`` (experts,) are the probabilities.
    """

    def __init__(self, shares: torch.Tensor, *, dim: int, seed: int = 0) -> None:
        super().__init__()
        direction = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
        edges = torch.cumsum(shares.double() / shares.sum(), dim=0)[:-1]
        self.register_buffer("direction", direction.double(), persistent=False)
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of ``tokens`` (n, dim)."""
        spread = 1000 * (tokens.double() @ self.direction)
        return torch.searchsorted(self.edges, spread - spread.floor())[:, None]

    @property
    def n_experts(self) -> int:
        """Number of experts to choose from."""
        return len(self.edges) + 1

    @property
    def macs(self) -> int:
        """MACs per token: none, a draw needs no product."""
        return 0


class ConstantRouter(nn.Module):
    """Send every token to the same expert: what a converted layer does without routing."""

    def __init__(self, expert: int = 0) -> None:
        super().__init__()
        self.register_buffer("expert", torch.tensor(expert))
        self.n_experts = expert + 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of ``tokens`` (n, dim)."""
        return self.expert.expand(len(tokens), 1)

    @property
    def macs(self) -> int:
        """MACs per token: none."""
        return 0
