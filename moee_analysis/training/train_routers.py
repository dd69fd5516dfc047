"""Routers that learn while experts are trained: straight through, or from a task of their own.

A token's expert is chosen by an argmax, through which no gradient flows. Of the two ways round it,
``straight_through`` multiplies what the expert puts out by a gate that is 1, and whose gradient is
that of the expert's probability (Bengio et al., arXiv:1308.3432). ``auxiliary`` adds a loss: the
cross-entropy of the choice of the expert that comes nearest to the dense MLP.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from moee_analysis.models.capture import watch
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


def find_learners(model: nn.Module) -> dict[str, Learner]:
    """Return the layers of ``model`` that have a choice of experts, by module name."""
    names, found = moe_names(model), {}
    for index, layer in moe_layers(model).items():
        router, leading, first = layer.router, 0, 0
        if isinstance(router, TokenKindRouter):
            leading, first, router = len(router.prefix), router.prefix_experts, router.inner
        if isinstance(router, (CosineRouter, NearestRouter)) and router.n_experts > 1:
            found[names[index]] = Learner(layer, router, leading, first)
    return found


@contextmanager
def trainable_routers(model: nn.Module) -> Iterator[None]:
    """While open, the buffers of the routers of ``model`` are parameters."""
    routers = [each.router for each in find_learners(model).values()]
    buffers = [(router, name) for router in routers for name in dict(router.named_buffers())]
    try:
        for router, name in buffers:
            router.register_parameter(name, nn.Parameter(router._buffers.pop(name)))
        yield
    finally:
        for router, name in buffers:
            if name in router._parameters:
                router.register_buffer(name, router._parameters.pop(name).detach())


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """While open, routers of ``model`` get gradients from the outputs of the experts they chose.

    The outputs stay what they are.
    """
    found = find_learners(model)

    def gate(name: str, seen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return _gate(found[name], *seen)

    with watch({name: each.layer for name, each in found.items()}, gate, "both"):
        yield


def _gate(each: Learner, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    p = probabilities(each, x).amax(dim=1)  # that of the expert that was chosen
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
def watch_learners(model: nn.Module) -> Iterator[dict[str, Learner]]:
    """While open, every forward pass leaves some of its tokens in the yielded learners."""
    found = find_learners(model)

    def see(name: str, x: torch.Tensor) -> None:
        each = found[name]
        tokens = tokens_of(x.detach()[:, each.leading :] if each.leading else x.detach())
        step = max(1, len(tokens) // TOKENS)
        each.tokens = tokens[step // 2 :: step]

    with watch({name: each.layer for name, each in found.items()}, see):
        yield found


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
    tokens, weights, wanted = each.tokens, each.layer.weights, mlp(each.tokens)
    errors = []
    for expert in range(each.first, each.layer.n_experts):
        chosen = torch.full((len(tokens), 1), expert, device=tokens.device)
        errors.append((masked(weights, tokens, chosen) - wanted).square().sum(dim=1))
    return torch.stack(errors).argmin(dim=0)
