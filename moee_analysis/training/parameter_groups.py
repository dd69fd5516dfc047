"""Which parameters of a model learn at which rate, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models import group_parameters
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.moe.expert_layer import expert_layers

NORMS = ("norm2", "norm")
"""Names of the norm before the MLP of a block, in timm's models."""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``params``, ``param_names``, ``weight_decay``, and ``lr_scale``.

    ``lr_scale`` is ``layer_decay`` to the power of the number of layers above, and 1 for layers
    with experts and the norms before them, which a pretrained model does not have as they are (MoE
    Jetpack; Zhu et al., arXiv:2406.04801). Norms, biases, temperatures, and what the model names in
    ``no_weight_decay``, do not decay.

    Raises ``MoeeError``: a ``layer_decay`` below 1 for a model that does not say which layers it
    has.
    """
    layers = _layers(model) if layer_decay < 1 else {}
    top, new = max(layers.values(), default=0), set(_of_experts(model))
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if name in new else layer_decay ** (top - layers.get(name, top))
        # timm's own rule looks at dimensions alone; biases of many experts have two
        decays = parameter.ndim > 1 and not name.endswith("bias") and name not in spared
        empty = {"params": [], "param_names": [], "lr_scale": scale}
        group = groups.setdefault((scale, decays), empty | {"weight_decay": weight_decay * decays})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _layers(model: nn.Module) -> dict[str, int]:
    """Layer of every parameter, from 0 at the images to the classifier's."""
    if not hasattr(model, "group_matcher"):
        raise MoeeError(
            "a timm model, which says which layers it has", type(model).__name__,
            "leave layer_decay at 1",
        )  # fmt: skip
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def _of_experts(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of layers with experts, and of the norms before them."""
    for name, layer in expert_layers(model).items():
        yield from (f"{name}.{own}" for own, _ in layer.named_parameters())
        block = name.rpartition(".")[0]
        children = dict(model.get_submodule(block).named_children())
        norm = next((child for child in NORMS if child in children), None)
        yield from (f"{block}.{norm}.{part}".lstrip(".") for part in ("weight", "bias") if norm)
