"""Losses by which routers with gates learn to use all experts alike.

As in V-MoE (Riquelme et al., arXiv:2106.05974, appendix A) and GShard (Lepikhin et al.,
arXiv:2006.16668, algorithm 1). Every image counts by itself, as it is routed, and the mean over the
images is the loss. Expert Choice needs none of them: its experts are used alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from moee_analysis.baselines.common.sparse_moe_layer import SparseMlp
from moee_analysis.baselines.common.sparse_routers import Routed, TopKRouter
from moee_analysis.errors import MoeeError


def importance_loss(logits: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the experts' sums of gates.

    ``logits`` (images, tokens, experts) are those without noise.
    """
    return _cv_squared(logits.softmax(dim=-1).sum(dim=-2)).mean()


def load_loss(logits: torch.Tensor, noisy: torch.Tensor, *, k: int, noise: float) -> torch.Tensor:
    """Squared coefficient of variation of how many tokens the experts can expect.

    That is the probability that an expert is among a token's ``k`` if its noise alone were drawn
    again, on average over the tokens. Logits are (images, tokens, experts), without and with noise
    of the standard deviation ``noise``.

    Raises
    ------
    MoeeError
        No noise, without which there is no such probability.
    """
    if not noise > 0:
        raise MoeeError("noise above 0", str(noise), "without noise use the other losses")
    least = noisy.topk(k).values[..., -1:]
    probability = torch.special.ndtr((logits - least) / noise)
    return _cv_squared(probability.mean(dim=-2)).mean()


def gshard_loss(noisy: torch.Tensor) -> torch.Tensor:
    """experts^2 x the mean over them of f_e P_e, 1 where all are used alike.

    f_e is the share of tokens whose largest gate is that of e, P_e the mean gate, of logits
    ``noisy`` (images, tokens, experts), with noise in training.
    """
    gates, experts = noisy.softmax(dim=-1), noisy.shape[-1]
    first = nn.functional.one_hot(gates.argmax(dim=-1), experts).to(gates.dtype)
    return experts * (first.mean(dim=-2) * gates.mean(dim=-2)).sum(dim=-1).mean()


@contextmanager
def routed_by(model: nn.Module) -> Iterator[dict[str, Routed]]:
    """While open, keep what the routers of sparse layers last returned, by the layer's name."""
    last: dict[str, Routed] = {}

    def keep(name: str, _router: nn.Module, _args: tuple, routed: Routed) -> None:
        last[name] = routed

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, SparseMlp):
                hook = layer.router.register_forward_hook(partial(keep, name))
                hooks.callback(hook.remove)
        yield last


def balance_loss(model: nn.Module, routed: Mapping[str, Routed]) -> torch.Tensor | float:
    """Sum of the importance and, with noise, load losses of the top-k layers of ``model``.

    ``routed`` is what :func:`routed_by` kept; 0 where no token chooses its experts.
    """
    total = 0.0
    for name, each in routed.items():
        router = model.get_submodule(name).router
        if isinstance(router, TopKRouter):
            total = total + importance_loss(each.logits)
            if router.gate.noise > 0:
                facts = {"k": router.k, "noise": router.gate.noise}
                total = total + load_loss(each.logits, each.noisy, **facts)
    return total


def _cv_squared(x: torch.Tensor) -> torch.Tensor:
    """Variance over the experts (..., experts) by the square of their mean."""
    return x.var(dim=-1, correction=0) / x.mean(dim=-1).square()
