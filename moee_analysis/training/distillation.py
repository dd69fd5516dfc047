"""Losses towards a dense model: to predict, and where wanted to compute, the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.extraction.record.token_kinds import unread_patches
from moee_analysis.models.capture import capture
from moee_analysis.models.loading import find_mlps
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.training.train_routers import choice_loss, straight_through, watch_learners

Losses = Callable[[torch.Tensor], torch.Tensor]
"""Images (n, channels, height, width) -> losses (n,)."""


def divergences(
    student: torch.Tensor, dense: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(dense || student) of the logits (images, classes) divided by T, in nats, (images,).

    Source: Hinton et al., arXiv:1503.02531.
    """
    wanted = log_softmax(dense.float() / temperature, dim=-1)
    found = log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)


def compared_blocks(dense: nn.Module) -> tuple[str, ...]:
    """Names of the blocks around the MLPs, but for those whose patches nothing reads any more."""
    unread = unread_patches(dense)
    names = [site.name for site in find_mlps(dense) if site.name not in unread]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def block_errors(
    student: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor], images: int
) -> torch.Tensor:
    """|student - dense|^2 / |dense|^2 of the outputs of every image, mean over blocks, (images,).

    Blocks may see the windows of an image one by one.
    """
    errors = []
    for name, wanted in dense.items():
        of_images = _first(wanted).float().reshape(images, -1)
        off = _first(student[name]).float().reshape(images, -1) - of_images
        errors.append(off.square().sum(dim=1) / of_images.square().sum(dim=1).clamp_min(1e-12))
    return torch.stack(errors).mean(dim=0)


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def losses_of(student: nn.Module, dense: nn.Module, config: FinetuneConfig) -> Iterator[Losses]:
    """While open, the yielded function runs both models on images and returns their losses."""
    blocks = compared_blocks(dense) if config.block_weight else ()
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
