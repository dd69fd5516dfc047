"""MLPs of a trained model exchanged for layers whose experts have weights of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import MlpSite, blank
from moee_analysis.moe.layer import replace_module


@dataclass(frozen=True)
class Place:
    """An MLP to exchange, and the tokens that it sees of one image.

    ``tokens`` are routed together: all that an image has, in ``groups`` = 1; in a model that cuts
    images into windows before, those of a window.
    """

    site: MlpSite
    groups: int
    tokens: int


def chosen(sites: Sequence[MlpSite], layers: Iterable[int]) -> list[MlpSite]:
    """Return the ``sites`` at ``layers``, counted from 0.

    Raises
    ------
    MoeeError
        No layers, or one that is not there.
    """
    wanted = sorted(set(layers))
    if not wanted or not set(wanted) <= set(range(len(sites))):
        raise MoeeError(
            f"layers between 0 and {len(sites) - 1}", str(wanted or "none"),
            "count layers from 0, as in timm's blocks.0",
        )  # fmt: skip
    return [sites[index] for index in wanted]


def places(model: nn.Module, sites: Sequence[MlpSite]) -> list[Place]:
    """Run one image, all zeros, through ``model`` to see which tokens the MLPs at ``sites`` get."""
    shapes: dict[str, torch.Size] = {}

    def see(name: str, _mlp: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        shapes[name] = args[0].shape

    with evaluating(model), ExitStack() as hooks:
        for site in sites:
            hook = site.module(model).register_forward_pre_hook(partial(see, site.name))
            hooks.callback(hook.remove)
        model(blank(model))
    return [Place(site, shapes[site.name][0], shapes[site.name][1:-1].numel()) for site in sites]


def exchanged(
    model: nn.Module, make: Mapping[MlpSite, Callable[[nn.Module], nn.Module]]
) -> nn.Module:
    """Copy ``model`` and put in the place of each MLP what ``make`` makes of it.

    The new layers have the MLP's device and precision, and ask for gradients where it does. The
    copy is in evaluation mode.
    """
    copied = copy.deepcopy(model)
    for site, layer_of in make.items():
        mlp = site.module(copied)
        weight = mlp.fc1.weight
        layer = layer_of(mlp).to(weight.device, weight.dtype)
        replace_module(copied, site.name, layer.requires_grad_(weight.requires_grad))
    return copied.eval()
