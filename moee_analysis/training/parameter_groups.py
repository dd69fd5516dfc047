"""Which parameters of a model learn at which rate, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models import group_parameters
from torch import nn

from moee_analysis.errors import MoeeError

_NORMS = ("norm2", "norm")
"""Names of the norm before the MLP of a block, in timm's models."""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``params``, their ``names``, ``weight_decay``, and ``scale``.

    ``scale`` is the factor on the learning rate: ``layer_decay`` to the power of the number of
    layers above, and 1 for layers with experts and the norms before them, which a pretrained model
    does not have as they are (MoE Jetpack; Zhu et al., arXiv:2406.04801). Norms, biases,
    temperatures, and what the model names in ``no_weight_decay``, do not decay.

    Raises
    ------
    MoeeError
        A ``layer_decay`` below 1 for a model that does not say which layers it has.
    """
    layers = _layers(model) if layer_decay < 1 else {}
    top = max(layers.values(), default=0)
    new, spared = set(_of_experts(model)), _without_decay(model)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if name in new else layer_decay ** (top - layers.get(name, top))
        decays = parameter.ndim > 1 and not name.endswith("bias") and name not in spared
        empty = {"params": [], "names": [], "scale": scale}
        group = groups.setdefault((scale, decays), empty | {"weight_decay": weight_decay * decays})
        group["params"].append(parameter)
        group["names"].append(name)
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
    """Names of the parameters of layers with experts and a router, and of the norms before them."""
    for name, module in model.named_modules():
        if hasattr(module, "n_experts") and hasattr(module, "router"):
            yield from (f"{name}.{own}" for own, _ in module.named_parameters())
            block = name.rpartition(".")[0]
            norm = _norm(model.get_submodule(block))
            yield from (f"{block}.{norm}.{part}".lstrip(".") for part in ("weight", "bias") if norm)


def _norm(block: nn.Module) -> str | None:
    children = dict(block.named_children())
    return next((name for name in _NORMS if name in children), None)


def _without_decay(model: nn.Module) -> set[str]:
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
