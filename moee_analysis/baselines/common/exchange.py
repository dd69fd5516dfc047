"""MLPs of a trained model exchanged for layers with experts, within a budget of MACs.

Experts with weights of their own: many MLPs of one shape, computed as batched products.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn.functional import linear

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import capture, evaluating
from moee_analysis.models.loading import MlpSite, blank
from moee_analysis.moe.layer import replace_module

Store = str | Path | None
"""Folder that keeps what was found of a model, to find it again; None keeps nothing."""


def add_noise(logits: torch.Tensor, router: nn.Module) -> torch.Tensor:
    """Add noise of the standard deviation ``router.noise``, in training alone."""
    if not router.training or router.noise == 0:
        return logits
    return logits + router.noise * torch.randn_like(logits)


def per_expert(tokens: int, experts: int, capacity: float = 1.0) -> int:
    """``capacity`` x tokens / experts, rounded, at least 1: with 1 as if every token had one."""
    return max(1, round(capacity * tokens / experts))


def fill_budget(
    saved: float, costs: Sequence[float], tokens: Sequence[int], *, dense: float, fixed: float
) -> list[int]:
    """Return how many tokens, or slots, every expert of each layer gets, to save a share of MACs.

    While the budget allows, the layer gets one more whose experts see the smallest share of its
    tokens. One of every expert of a layer costs ``costs`` MACs, an image has so many ``tokens``
    there, the most that an expert gets. It costs the ``dense`` model so many MACs, and the other
    one, without its experts, ``fixed`` ones.

    Raises ``MoeeError``: one token, or slot, per expert is too much already.
    """
    counts, left = [1] * len(costs), (1 - saved) * dense - fixed - sum(costs)
    if left < 0:
        most = math.floor(1000 * (saved + left / dense)) / 1000
        raise MoeeError(
            f"a MACs reduction of at most {most:.1%}", f"{saved:.1%}",
            "save less, or have fewer experts or more layers with experts",
        )  # fmt: skip
    while growing := [
        (count / most, layer)
        for layer, (count, most, cost) in enumerate(zip(counts, tokens, costs, strict=True))
        if count < most and cost <= left
    ]:
        _, layer = min(growing)
        counts[layer] += 1
        left -= costs[layer]
    return counts


def sites_at(
    sites: Sequence[MlpSite], layers: Iterable[int] | None, *, first: int = 0, step: int = 1
) -> list[MlpSite]:
    """The ``sites`` at ``layers``, counted from 0; None: every ``step``-th, from the ``first`` on.

    Raises ``MoeeError``: no layers, or one that is not there.
    """
    wanted = sorted(set(range(first, len(sites), step) if layers is None else layers))
    if not wanted or not set(wanted) <= set(range(len(sites))):
        raise MoeeError(
            f"layers between 0 and {len(sites) - 1}", str(wanted or "none"),
            "count layers from 0, as in timm's blocks.0",
        )  # fmt: skip
    return [sites[index] for index in wanted]


def find_tokens(model: nn.Module, sites: Sequence[MlpSite]) -> list[tuple[int, int]]:
    """Groups of tokens that an image has at ``sites``, and the tokens of each, by a run on zeros.

    Those of a group are routed together: all of an image or, where a model cuts it into windows
    before, all of a window.
    """
    with evaluating(model), capture(model, [site.name for site in sites]) as inputs:
        model(blank(model))
    shapes = [inputs[site.name].shape for site in sites]
    return [(shape[0], shape[1:-1].numel()) for shape in shapes]


def replace_mlps(
    model: nn.Module,
    sizes: Iterable[tuple[MlpSite, Any]],
    make: Callable[[MlpSite, Any, nn.Module], nn.Module],
) -> nn.Module:
    """Copy ``model``, in evaluation mode, with what is made of a site, its size and its MLP there.

    Layers have the MLP's device and precision, and ask for gradients where it does.
    """
    copied = copy.deepcopy(model)
    for site, size in sizes:
        mlp = site.module(copied)
        weight = mlp.fc1.weight
        layer = make(site, size, mlp).to(weight.device, weight.dtype)
        replace_module(copied, site.name, layer.requires_grad_(weight.requires_grad))
    return copied.eval()


class ExpertMlps(nn.Module):
    """Copies of ``mlps``, all of one shape, each of which sees inputs of its own.

    Weights are ``fc1_weight`` (experts, hidden, dim), ``fc1_bias`` (experts, hidden),
    ``fc2_weight`` (experts, dim, hidden), ``fc2_bias`` (experts, dim). ``drop`` is the rate at
    which hidden activations, and outputs, drop out in training.
    """

    def __init__(self, mlps: Sequence[Mlp], act: nn.Module, *, drop: float = 0.0) -> None:
        super().__init__()
        for layer in ("fc1", "fc2"):
            maps = [getattr(mlp, layer) for mlp in mlps]
            weight = torch.stack([each.weight.detach() for each in maps])
            bias = weight.new_zeros(weight.shape[:2])
            if maps[0].bias is not None:
                bias = torch.stack([each.bias.detach() for each in maps])
            self.register_parameter(f"{layer}_weight", nn.Parameter(weight))
            self.register_parameter(f"{layer}_bias", nn.Parameter(bias))
        self.act = act
        self.drop = nn.Dropout(drop)

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.fc1_weight)

    @property
    def hidden(self) -> int:
        """Hidden neurons of each expert."""
        return self.fc1_weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs (images, experts, inputs of each, dim) to outputs of the same shape."""
        own = x.transpose(0, 1).flatten(1, 2)  # (experts, all inputs of each, dim)
        return self._batched(own).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)

    def in_turn(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Map inputs (n, dim), sorted by expert, to their outputs; ``counts`` are those of each."""
        if len(set(counts)) == 1:
            return self._batched(x.unflatten(0, (self.n_experts, counts[0]))).flatten(0, 1)
        stacked = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        # taken apart at once: the gradient of a single expert's slice is as large as them all
        experts = zip(x.split(counts), *(each.unbind() for each in stacked), strict=True)
        outputs = []
        for own, fc1_weight, fc1_bias, fc2_weight, fc2_bias in experts:
            hidden = self.drop(self.act(linear(own, fc1_weight, fc1_bias)))
            outputs.append(self.drop(linear(hidden, fc2_weight, fc2_bias)))
        return torch.cat(outputs)

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs (experts, inputs of each, dim)."""
        hidden = torch.baddbmm(self.fc1_bias[:, None], x, self.fc1_weight.mT)
        hidden = self.drop(self.act(hidden))
        return self.drop(torch.baddbmm(self.fc2_bias[:, None], hidden, self.fc2_weight.mT))
