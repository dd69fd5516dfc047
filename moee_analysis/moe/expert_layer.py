"""All layers with experts alike, whatever their kind: hard or soft, of a dense MLP or their own."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from moee_analysis.models.capture import watch
from moee_analysis.models.macs import moe_macs
from moee_analysis.moe.layer import MoeMlp

Usage = dict[str, torch.Tensor]


@runtime_checkable
class ExpertLayer(Protocol):
    """A layer whose ``router`` decides what its ``n_experts`` experts compute."""

    router: nn.Module

    @property
    def n_experts(self) -> int:
        """Number of experts."""

    def usage(self, routed: Any) -> torch.Tensor:
        """Tokens, or shares of their outputs, of each expert, float64 (experts,)."""


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Return the layers of ``model`` that have experts, in order, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer)}


@contextmanager
def counting_usage(models: Mapping[Hashable, nn.Module]) -> Iterator[dict[Hashable, Usage]]:
    """While open, add up how much each expert is used, float64 (experts,), by model and layer."""
    layers = {name: expert_layers(model) for name, model in models.items()}
    sums = {
        name: {place: torch.zeros(e.n_experts, dtype=torch.float64) for place, e in own.items()}
        for name, own in layers.items()
    }

    def add(key: tuple[Hashable, str], routed: Any) -> None:
        name, place = key
        sums[name][place] += layers[name][place].usage(routed).cpu()

    routers = {(name, place): e.router for name, own in layers.items() for place, e in own.items()}
    with watch(routers, add, "outputs"):
        yield sums


def macs_as_used(model: nn.Module, usage: Usage) -> float:
    """MACs of one image, where experts are used as :func:`counting_usage` has counted.

    Layers that hold parts of a dense MLP cost what their tokens use; all else costs what it runs.
    """
    per_token = {}
    for name, layer in expert_layers(model).items():
        if isinstance(layer, MoeMlp):
            experts_per_token = layer.shares.double().sum().item()
            shares = experts_per_token * usage[name] / usage[name].sum()
            per_token[name] = layer.macs_per_token(shares)
    return moe_macs(model, per_token)
