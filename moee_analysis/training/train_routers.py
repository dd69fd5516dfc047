"""Routers that learn while experts are trained: straight through, or from a task of their own.

A token's expert is chosen by an argmax, through which no gradient flows. Of the two ways round it,
``straight_through`` multiplies what the expert puts out by a gate that is 1, and whose gradient is
that of the expert's probability (Bengio et al., arXiv:1308.3432). ``auxiliary`` adds a loss: the
cross-entropy of the choice of the expert that comes nearest to the dense MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels.dispatch import masked
from moee_analysis.moe.layer import MoeMlp, moe_layers, moe_names
from moee_analysis.moe.routers import CosineRouter, NearestRouter, TokenKindRouter

ROUTERS = ("frozen", "straight_through", "auxiliary")
TOKENS = 64  # of a batch and layer, whose nearest experts are looked for


@dataclass
class Learner:
    """A routed layer whose router compares experts, and the ``tokens`` it has just seen.

    The first ``leading`` tokens of an image have experts of their own, whose numbers come first.
    """

    layer: MoeMlp
    router: CosineRouter | NearestRouter
    leading: int = 0
    first: int = 0
    tokens: torch.Tensor | None = field(default=None, repr=False)


def learners(model: nn.Module) -> dict[str, Learner]:
    """Return the layers of ``model`` that have a choice of experts, by module name."""
    names = moe_names(model)
    found = {names[index]: _learner(layer) for index, layer in moe_layers(model).items()}
    return {name: each for name, each in found.items() if each is not None}


def _learner(layer: MoeMlp) -> Learner | None:
    router, leading, first = layer.router, 0, 0
    if isinstance(router, TokenKindRouter):
        leading, first, router = len(router.prefix), router.prefix_experts, router.inner
    compares = isinstance(router, (CosineRouter, NearestRouter)) and router.n_experts > 1
    return Learner(layer, router, leading, first) if compares else None


@contextmanager
def trainable_routers(model: nn.Module) -> Iterator[None]:
    """While open, what the routers of ``model`` hold are parameters; buffers again afterwards."""
    routers = [each.router for each in learners(model).values()]
    names = [[name for name, held in router.named_buffers()] for router in routers]
    try:
        for router, own in zip(routers, names, strict=True):
            for name in own:
                router.register_parameter(name, nn.Parameter(router._buffers.pop(name)))
        yield
    finally:
        for router, own in zip(routers, names, strict=True):
            for name in [name for name in own if name in router._parameters]:
                router.register_buffer(name, router._parameters.pop(name).detach())


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """While open, routers of ``model`` get gradients from the outputs of the experts they chose.

    The outputs stay what they are.
    """
    with ExitStack() as hooks:
        for each in learners(model).values():
            hooks.callback(each.layer.register_forward_hook(partial(_gate, each)).remove)
        yield


def _gate(
    each: Learner, _: MoeMlp, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    p = probabilities(each, args[0]).amax(dim=1)  # that of the expert that was chosen
    gate = (1 + p - p.detach()).to(output.dtype)
    if each.leading:
        gate = pad(gate.unflatten(0, (len(output), -1)), (each.leading, 0), value=1.0)
    bias = each.layer.fc2.bias
    return bias + (output - bias) * gate.reshape(*output.shape[:-1], 1)


def probabilities(each: Learner, x: torch.Tensor) -> torch.Tensor:
    """Softmax of the router's scores (tokens, experts), of the tokens that have a choice.

    Scores are taken in units of their own spread, as their scale means nothing to an argmax.
    """
    scores = each.router.scores(x[:, each.leading :] if each.leading else x).float()
    spread = scores.detach().std(dim=1).mean().clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.softmax(scores / spread, dim=1)


@contextmanager
def seen_by_learners(model: nn.Module) -> Iterator[dict[str, Learner]]:
    """While open, every forward pass leaves some of its tokens in the yielded learners."""
    found = learners(model)
    with ExitStack() as hooks:
        for each in found.values():
            hooks.callback(each.layer.register_forward_pre_hook(partial(_see, each)).remove)
        yield found


def _see(each: Learner, _: MoeMlp, args: tuple[torch.Tensor]) -> None:
    x = args[0].detach()
    tokens = tokens_of(x[:, each.leading :] if each.leading else x)
    step = max(1, len(tokens) // TOKENS)
    each.tokens = tokens[step // 2 :: step]


def choice_loss(seen: dict[str, Learner], dense: nn.Module) -> torch.Tensor:
    """Cross-entropy, in nats, of the routers' probabilities of the experts nearest to ``dense``.

    Mean over layers and their :data:`TOKENS` tokens; the experts get no gradient of it.
    """
    losses = []
    for name, each in seen.items():
        nearest = nearest_experts(each, dense.get_submodule(name))
        p = probabilities(Learner(each.layer, each.router), each.tokens)
        losses.append(cross_entropy(p.clamp_min(1e-12).log(), nearest))
    return torch.stack(losses).mean()


@torch.no_grad()
def nearest_experts(each: Learner, mlp: nn.Module) -> torch.Tensor:
    """Which expert's output is nearest to that of the dense ``mlp``, int64 (tokens,).

    Experts of leading tokens are not among them; the numbers are those of the router.
    """
    tokens, wanted = each.tokens, mlp(each.tokens)
    errors = [
        (masked(each.layer.weights, tokens, _all(tokens, expert)) - wanted).square().sum(dim=1)
        for expert in range(each.first, each.layer.n_experts)
    ]
    return torch.stack(errors).argmin(dim=0)


def _all(tokens: torch.Tensor, expert: int) -> torch.Tensor:
    return torch.full((len(tokens), 1), expert, device=tokens.device)
