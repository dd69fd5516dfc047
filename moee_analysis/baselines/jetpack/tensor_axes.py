"""Which units of a model the entries of its tensors belong to: channels, heads, hidden neurons.

A narrower model keeps some units of each kind, and of every tensor the entries of these. Units are
called by a place in the model: the channels of a stage by the stage (``blocks``, ``stages.2``), the
inner ones of an attention or an MLP by its name (``blocks.3.attn``, ``blocks.3.mlp``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps

CHANNELS, BEFORE, INNER = "channels", "channels of the stage before", "inner units"

_VIT = {
    "": (None, None, CHANNELS),  # embeddings (1, tokens, dim)
    "patch_embed.proj": (CHANNELS,),
    "norm_pre": (CHANNELS,),
    "blocks.*.norm1": (CHANNELS,),
    "blocks.*.attn.qkv": (INNER, CHANNELS),
    "blocks.*.attn.q_norm": (),
    "blocks.*.attn.k_norm": (),
    "blocks.*.attn.proj": (CHANNELS, INNER),
    "blocks.*.ls1": (CHANNELS,),
    "blocks.*.norm2": (CHANNELS,),
    "blocks.*.mlp.fc1": (INNER, CHANNELS),
    "blocks.*.mlp.fc2": (CHANNELS, INNER),
    "blocks.*.ls2": (CHANNELS,),
    "norm": (CHANNELS,),
    "fc_norm": (CHANNELS,),
    "head": (None, CHANNELS),
}
_CONVNEXT = {
    "stem.0": (CHANNELS,),
    "stem.1": (CHANNELS,),
    "stages.*.downsample.0": (BEFORE,),
    "stages.*.downsample.1": (CHANNELS, BEFORE),
    "stages.*.blocks.*": (CHANNELS,),  # the layer scale
    "stages.*.blocks.*.conv_dw": (CHANNELS,),
    "stages.*.blocks.*.norm": (CHANNELS,),
    "stages.*.blocks.*.mlp.fc1": (INNER, CHANNELS),
    "stages.*.blocks.*.mlp.fc2": (CHANNELS, INNER),
    "norm_pre": (CHANNELS,),
    "head.norm": (CHANNELS,),
    "head.fc": (None, CHANNELS),
}
UNITS: dict[type[nn.Module], Mapping[str, tuple[str | None, ...]]] = {
    VisionTransformer: _VIT,
    ConvNeXt: _CONVNEXT,
}
"""Kinds of units along the axes of a module's weight, by timm's class and the module's name."""


def unit_counts(model: nn.Module) -> dict[str, int]:
    """Channels of every stage, heads of every attention, hidden neurons of every MLP, by place."""
    sites = find_mlps(model)
    channels = {stage_of(model, site.name): site.dim for site in sites}
    heads = {name: count for name, (count, _) in heads_of(model).items()}
    return channels | heads | {site.name: site.hidden for site in sites}


def heads_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Heads, and dimensions of each, of every attention."""
    attentions = {n: m for n, m in model.named_modules() if n.endswith(".attn")}
    return {name: (attn.num_heads, attn.head_dim) for name, attn in attentions.items()}


def stage_of(model: nn.Module, name: str) -> str:
    """Stage whose channels the module ``name`` writes to, or reads where it writes to none."""
    if isinstance(model, VisionTransformer):
        return "blocks"
    first, _, rest = name.partition(".")
    if first == "stages":
        return f"stages.{rest.partition('.')[0]}"
    return "stages.0" if first == "stem" else f"stages.{len(model.stages) - 1}"


def narrow_tensors(model: nn.Module, kept: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """State dict of ``model`` with the ``kept`` units alone, ids by their place."""
    tensors = model.state_dict().items()
    return {name: _narrow(model, name, tensor, kept) for name, tensor in tensors}


def classifier_of(model: nn.Module) -> str:
    """Name of the linear map to the classes."""
    return "head" if isinstance(model, VisionTransformer) else "head.fc"


def _narrow(
    model: nn.Module, name: str, tensor: torch.Tensor, kept: Mapping[str, np.ndarray]
) -> torch.Tensor:
    module = name.rpartition(".")[0]
    for axis, units in enumerate(_kinds(model, module)[: tensor.ndim]):
        if units is not None:
            times = 3 if module.endswith(".qkv") and units == INNER else 1
            own = torch.as_tensor(kept[_place(model, module, units)])
            offsets = torch.arange(times) * (tensor.shape[axis] // times)
            ids = (offsets[:, None] + own).flatten().to(tensor.device)
            tensor = tensor.index_select(axis, ids)
    return tensor.clone()


def _kinds(model: nn.Module, module: str) -> tuple[str | None, ...]:
    pattern = re.sub(r"(stages|blocks)\.\d+", r"\1.*", module)
    try:
        return UNITS[type(model)][pattern]
    except KeyError:
        raise MoeeError(
            "a plain vision transformer or ConvNeXt of timm's",
            f"a {type(model).__name__} with '{module}'",
            "choose a ViT, DeiT or ConvNeXt without pooling by attention",
        ) from None


def _place(model: nn.Module, module: str, units: str) -> str:
    if units == INNER:
        return module.rpartition(".")[0]
    stage = stage_of(model, module)
    if units == BEFORE:
        return f"stages.{int(stage.rpartition('.')[2]) - 1}"
    return stage
