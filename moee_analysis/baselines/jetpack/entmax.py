"""Entmax with alpha = 1.5: like a softmax, but what lags far behind gets exactly nothing.

Source: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, algorithm 2.
"""

from __future__ import annotations

import torch


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """Return the weights (..., n) of ``logits`` (..., n): they sum to 1, some may be 0.

    They are max(x / 2 - tau, 0)^2, and tau is what makes them sum to 1. Gradients are those of
    this formula among the weights that are not 0.
    """
    halves = (logits - logits.amax(dim=-1, keepdim=True).detach()) / 2
    support = _support(halves.detach())
    count = support.sum(dim=-1, keepdim=True)
    zeroed = halves.masked_fill(~support, 0.0)
    mean = zeroed.sum(dim=-1, keepdim=True) / count
    scatter = ((halves - mean).masked_fill(~support, 0.0)).square().sum(dim=-1, keepdim=True)
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
