"""Losses towards a dense model: to predict, and where wanted to compute, the same.

Routers can learn while experts are trained: a token's expert is chosen by an argmax, through which
no gradient flows. Of the two ways round it, ``straight_through`` multiplies what the expert puts
out by a gate that is 1, and whose gradient is that of the expert's probability (Bengio et al.,
arXiv:1308.3432). ``auxiliary`` adds a loss: the cross-entropy of the choice of the expert that
comes nearest to the dense MLP.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad

from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.models.capture import capture, watch
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels import masked
from moee_analysis.moe.layer import MoeMlp, moe_layers, moe_names
from moee_analysis.moe.routers import CosineRouter, NearestRouter, TokenKindRouter
from moee_analysis.training.config import FinetuneConfig

Losses = Callable[[torch.Tensor], torch.Tensor]
"""Images (n, channels, height, width) -> losses (n,)."""

TOKENS = 64  # of a batch and layer, whose nearest experts are looked for


@contextmanager
def losses_of(student: nn.Module, dense: nn.Module, config: FinetuneConfig) -> Iterator[Losses]:
    """While open, the yielded function runs both models on images and returns their losses."""
    blocks = blocks_to_compare(dense) if config.block_weight else ()
    with ExitStack() as stack:
        of_dense = stack.enter_context(capture(dense, blocks, "outputs"))
        of_student = stack.enter_context(capture(student, blocks, "outputs"))
        learners = {}
        if config.router == "straight_through":
            stack.enter_context(straight_through(student))
        elif config.router == "auxiliary":
            learners = stack.enter_context(watch_learners(student))

        def losses(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = dense(x)
            found = divergences(student(x), wanted, temperature=config.temperature)
            if blocks:
                found = found + config.block_weight * block_errors(of_student, of_dense, len(x))
            if learners:
                found = found + config.router_weight * choice_loss(learners, dense)
            return found

        yield losses


def divergences(
    student: torch.Tensor, dense: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(dense || student) of the logits (images, classes) divided by T, in nats, (images,).

    Source: Hinton et al., arXiv:1503.02531.
    """
    wanted = log_softmax(dense.float() / temperature, dim=-1)
    found = log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)


def blocks_to_compare(dense: nn.Module) -> tuple[str, ...]:
    """Names of the blocks around the MLPs, but for those whose patches nothing reads any more."""
    unread = unread_patches(dense)
    names = [site.name for site in find_mlps(dense) if site.name not in unread]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def block_errors(
    student: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor], images: int
) -> torch.Tensor:
    """|student - dense|^2 / |dense|^2 of the outputs of every image, mean over blocks, (images,).

    Blocks may see the windows of an image one by one, and put out a tuple.
    """
    errors = []
    for name in dense:
        found, wanted = (
            (each[0] if isinstance(each, tuple) else each).float().reshape(images, -1)
            for each in (student[name], dense[name])
        )
        off, size = (each.square().sum(dim=1) for each in (found - wanted, wanted))
        errors.append(off / size.clamp_min(1e-12))
    return torch.stack(errors).mean(dim=0)


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
        router, before = layer.router, (0, 0)
        if isinstance(router, TokenKindRouter):
            router, before = router.inner, (len(router.prefix), router.prefix_experts)
        if isinstance(router, (CosineRouter, NearestRouter)) and router.n_experts > 1:
            found[names[index]] = Learner(layer, router, *before)
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


def probabilities(router: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax of the router's scores (tokens, experts).

    Scores are taken in units of their own spread, as their scale means nothing to an argmax.
    """
    scores = router.scores(tokens).float()
    spread = scores.detach().std(dim=1).mean().clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.softmax(scores / spread, dim=1)


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """While open, unchanged outputs of chosen experts give the routers of ``model`` gradients."""
    found = find_learners(model)

    def gate(name: str, seen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        each, (x, output) = found[name], seen
        p = probabilities(each.router, x[:, each.leading :]).amax(dim=1)  # of the chosen expert
        gate = (1 + p - p.detach()).to(output.dtype)
        if each.leading:
            gate = pad(gate.unflatten(0, (len(output), -1)), (each.leading, 0), value=1.0)
        bias = each.layer.fc2.bias
        return bias + (output - bias) * gate.reshape(*output.shape[:-1], 1)

    with watch({name: each.layer for name, each in found.items()}, gate, "both"):
        yield


@contextmanager
def watch_learners(model: nn.Module) -> Iterator[dict[str, Learner]]:
    """While open, every forward pass leaves some of its tokens in the yielded learners."""
    found = find_learners(model)

    def see(name: str, x: torch.Tensor) -> None:
        tokens = tokens_of(x.detach()[:, found[name].leading :])
        step = max(1, len(tokens) // TOKENS)
        found[name].tokens = tokens[step // 2 :: step]

    with watch({name: each.layer for name, each in found.items()}, see):
        yield found


def choice_loss(seen: dict[str, Learner], dense: nn.Module) -> torch.Tensor:
    """Cross-entropy (nats) of the experts nearest to ``dense``; teaches the routers alone."""
    losses = []
    for name, each in seen.items():
        nearest = nearest_experts(each, dense.get_submodule(name))
        p = probabilities(each.router, each.tokens)
        losses.append(cross_entropy(p.clamp_min(1e-12).log(), nearest))
    return torch.stack(losses).mean()


@torch.no_grad()
def nearest_experts(each: Learner, mlp: nn.Module) -> torch.Tensor:
    """Numbers, to the router, of the experts whose outputs are nearest to ``mlp``'s, (tokens,)."""
    tokens, wanted, errors = each.tokens, mlp(each.tokens), []
    for expert in range(each.first, each.layer.n_experts):
        chosen = torch.full((len(tokens), 1), expert, device=tokens.device)
        output = masked(each.layer, tokens, chosen)
        errors.append((output - wanted).square().sum(dim=1))
    return torch.stack(errors).argmin(dim=0)
