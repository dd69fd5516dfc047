"""The router of SpheroMoE: slots ask for tokens by directions on a sphere.

Source: MoE Jetpack, section 3.3, and its released code where the paper leaves something open.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from moee_analysis.baselines.common.soft_moe_layer import Mixing
from moee_analysis.baselines.jetpack.entmax import entmax15


class SpheroRouter(nn.Module):
    """Dispatch and combine by the directions of tokens and of learned queries.

    ``queries`` (experts, slots, dim) start orthogonal, as far as there are dimensions; they are
    normed like tokens (``query_norm``), then scaled to length 1. Logits are divided by
    ``dispatch_temperature`` and softmaxed over the tokens, or by ``combine_temperature`` and
    softmaxed (or ``entmax15``) over all slots. All of these are learned.

    Noise is added to the logits in training alone; the released code adds it in evaluation too.

    Parameters
    ----------
    slots
        Slots of each expert.
    temperature
        Of dispatch and combine at the start.
    combine
        ``softmax``, or ``entmax15``, which leaves most slots out.
    normalize_key
        Whether tokens are scaled to length 1 as well, so that logits are cosines.
    noise
        Standard deviation; None is one over the number of experts.
    seed
        Of the queries.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        slots: int = 1,
        temperature: float = 0.5,
        combine: Literal["softmax", "entmax15"] = "softmax",
        normalize_key: bool = True,
        noise: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        queries = nn.init.orthogonal_(torch.empty(experts, slots * dim), generator=generator)
        self.queries = nn.Parameter(queries.unflatten(1, (slots, dim)).contiguous())
        self.query_norm = nn.LayerNorm(dim)
        self.dispatch_temperature = nn.Parameter(torch.tensor(temperature))
        self.combine_temperature = nn.Parameter(torch.tensor(temperature))
        self.combine = entmax15 if combine == "entmax15" else partial(torch.softmax, dim=-1)
        self.normalize_key = normalize_key
        self.noise = 1 / experts if noise is None else noise

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the mixing of ``tokens`` (images, tokens, dim)."""
        logits = self.logits(tokens)
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return Mixing(
            (logits / self.dispatch_temperature).softmax(dim=1),
            self.combine(logits / self.combine_temperature),
        )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return products of tokens and queries, (images, tokens, experts x slots).

        They have the precision of the queries, which autocast may lower in the product.
        """
        queries = functional.normalize(self.query_norm(self.queries.flatten(0, 1)), dim=1)
        keys = functional.normalize(tokens, dim=2) if self.normalize_key else tokens
        return (keys @ queries.T).to(self.queries.dtype)


class ExpertDropout(nn.Module):
    """Outputs of experts drop out in training; those that stay grow as much in turn.

    Parameters
    ----------
    rate
        Probability to drop out.
    of_images
        Whether all experts of an image drop out together, or each for itself.
    """

    def __init__(self, rate: float, *, of_images: bool = False) -> None:
        super().__init__()
        self.rate, self.of_images = rate, of_images

    def forward(self, made: torch.Tensor) -> torch.Tensor:
        """Return the outputs ``made`` (images, experts, slots, dim) of those that stay."""
        if not self.training or not self.rate:
            return made
        experts = 1 if self.of_images else made.shape[1]
        kept = made.new_empty(len(made), experts, 1, 1).bernoulli_(1 - self.rate)
        return made * kept / (1 - self.rate)
