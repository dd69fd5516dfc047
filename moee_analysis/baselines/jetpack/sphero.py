"""SpheroMoE: slots ask for tokens by directions on a sphere, and experts drop out in training.

Source: MoE Jetpack, section 3.3, and its released code where the paper leaves something open.
"""

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from moee_analysis.baselines.common.soft_moe_layer import Mixing


class SpheroRouter(nn.Module):
    """Dispatch and combine by the directions of tokens and of learned queries.

    ``queries`` (experts, slots, dim) start orthogonal, as far as there are dimensions; they are
    normed like tokens (``query_norm``), then scaled to length 1. Logits are divided by
    ``dispatch_temperature`` and softmaxed over the tokens, or by ``combine_temperature`` and
    softmaxed (or ``entmax15``) over all slots. All of these are learned.

    Noise is added to the logits in training alone; the released code adds it in evaluation too.

    - ``slots``: slots of each expert.
    - ``temperature``: of dispatch and combine at the start.
    - ``combine``: ``softmax``, or ``entmax15``, which leaves most slots out.
    - ``normalize_key``: whether tokens are scaled to length 1 as well, so that logits are cosines.
    - ``noise``: standard deviation; None is one over the number of experts.
    - ``seed``: of the queries.
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
        dispatch = (logits / self.dispatch_temperature).softmax(dim=1)
        return Mixing(dispatch, self.combine(logits / self.combine_temperature))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return products of tokens and queries, (images, tokens, experts x slots).

        They have the precision of the queries, which autocast may lower in the product.
        """
        queries = functional.normalize(self.query_norm(self.queries.flatten(0, 1)), dim=1)
        keys = functional.normalize(tokens, dim=2) if self.normalize_key else tokens
        return (keys @ queries.T).to(self.queries.dtype)


class ExpertDropout(nn.Module):
    """Outputs of experts drop out in training at a ``rate``; the others grow as much in turn.

    ``of_images``: all experts of an image drop out together, not each for itself.
    """

    def __init__(self, rate: float, *, of_images: bool = False) -> None:
        super().__init__()
        self.rate, self.of_images = rate, of_images

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return ``outputs`` (images, experts, slots, dim), those that drop out zero."""
        if not self.training or not self.rate:
            return outputs
        experts = 1 if self.of_images else outputs.shape[1]
        staying = outputs.new_empty(len(outputs), experts, 1, 1).bernoulli_(1 - self.rate)
        return outputs * staying / (1 - self.rate)


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Return the weights (..., n) of ``logits`` (..., n): like a softmax, but many exactly 0.

    They are max(x / 2 - tau, 0)^2, and tau is what makes them sum to 1. Gradients are those of
    this formula among the weights that are not 0.

    Source: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, algorithm 2.
    """
    halves = (logits - logits.amax(dim=-1, keepdim=True).detach()) / 2
    support = _support(halves.detach())
    count = support.sum(dim=-1, keepdim=True)
    mean = halves.masked_fill(~support, 0.0).sum(dim=-1, keepdim=True) / count
    scatter = (halves - mean).masked_fill(~support, 0.0).square().sum(dim=-1, keepdim=True)
    tau = mean - ((1 - scatter) / count).sqrt()
    return (halves - tau).masked_fill(~support, 0.0).square()


def _support(halves: torch.Tensor) -> torch.Tensor:
    """Which weights are not 0: the most of the largest values that leave tau below them all."""
    ordered = halves.sort(dim=-1, descending=True).values
    count = torch.arange(1, halves.shape[-1] + 1, device=halves.device, dtype=halves.dtype)
    mean = ordered.cumsum(dim=-1) / count
    scatter = count * (ordered.square().cumsum(dim=-1) / count - mean.square())
    tau = mean - ((1 - scatter).clamp(min=0) / count).sqrt()
    last = (tau <= ordered).sum(dim=-1, keepdim=True) - 1
    return halves >= ordered.gather(-1, last)
