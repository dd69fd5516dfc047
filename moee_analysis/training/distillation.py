"""What a model learns from its dense model: to predict, and where wanted to compute, the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.extraction.record.token_kinds import unread_patches
from moee_analysis.models.loading import find_mlps


def divergences(
    student: torch.Tensor, dense: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(dense || student) of the logits (images, classes) divided by T, in nats, (images,).

    Source: Hinton et al., arXiv:1503.02531.
    """
    wanted = log_softmax(dense.float() / temperature, dim=-1)
    found = log_softmax(student.float() / temperature, dim=-1)
    each = kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * each


def compared_blocks(dense: nn.Module) -> tuple[str, ...]:
    """Names of the blocks around the MLPs, but for those whose patches nothing reads any more."""
    unread = unread_patches(dense)
    names = [site.name for site in find_mlps(dense) if site.name not in unread]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


@contextmanager
def block_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward pass leaves the outputs of the named blocks in the yielded dict."""
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            block = model.get_submodule(name)
            hooks.callback(block.register_forward_hook(partial(_keep, outputs, name)).remove)
        yield outputs


def _keep(
    outputs: dict[str, torch.Tensor], name: str, _block: nn.Module, _args: tuple, output: object
) -> None:
    outputs[name] = output[0] if isinstance(output, tuple) else output


def block_errors(
    student: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor], images: int
) -> torch.Tensor:
    """|student - dense|^2 / |dense|^2 of the outputs of every image, mean over blocks, (images,).

    Blocks may see the windows of an image one by one.
    """
    errors = []
    for name, wanted in dense.items():
        of_images = wanted.float().reshape(images, -1)
        off = student[name].float().reshape(images, -1) - of_images
        errors.append(off.square().sum(dim=1) / of_images.square().sum(dim=1).clamp_min(1e-12))
    return torch.stack(errors).mean(dim=0)
