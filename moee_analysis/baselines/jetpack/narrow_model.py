"""Narrower models of the same kind: how timm builds them, and which units they keep.

Vision transformers get fewer heads; of ConvNeXts all stages are narrowed alike. The place of units
is the stage of channels (``blocks``, ``stages.2``), or the attention or MLP of inner units
(``blocks.3.attn``, ``blocks.3.mlp``).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps


def successor(dense: nn.Module, width: int | None = None, *, seed: int = 0) -> nn.Module:
    """Return a model like ``dense`` of another ``width``, with random weights, as timm starts it.

    It is in evaluation mode, on the device of ``dense``, and asks for gradients where that does.
    The ``width`` is that of the last stage; None is that of ``dense``.

    Raises ``MoeeError``: a model that is neither a plain vision transformer nor a plain ConvNeXt; a
    width without whole heads, or without whole stages.
    """
    settings = _find_settings(dense)
    settings |= _change_width(dense, settings, width or dense.num_features)
    like = next(dense.parameters())
    settings |= _SHAPES_ALONE.get(type(dense), {}) if like.is_meta else {}
    with torch.device("meta" if like.is_meta else "cpu"), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = type(dense)(**settings)
    others = {"architecture", "file", "url", "hf_hub_id", "tag"}  # whose weights the dense ones are
    own = {k: v for k, v in dense.pretrained_cfg.items() if k not in others}
    model.pretrained_cfg = own | {"num_classes": dense.num_classes}
    return model.eval().requires_grad_(like.requires_grad).to(like.device, like.dtype)


def _find_settings(dense: nn.Module) -> dict[str, Any]:
    """Arguments with which timm builds a model like ``dense``; checked module by module."""
    if type(dense) not in SETTINGS:
        raise _unsupported(f"a {type(dense).__name__}")
    try:
        settings = SETTINGS[type(dense)](dense)
        with torch.device("meta"):
            like = type(dense)(**settings, **_SHAPES_ALONE.get(type(dense), {}))
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        raise _unsupported(f"a variant ({error})") from None
    found, wanted = ({n: t.shape for n, t in m.state_dict().items()} for m in (like, dense))
    pooling = getattr(dense, "attn_pool", None)  # whose units no rule below knows
    if repr(like) != repr(dense) or found != wanted or pooling is not None:
        raise _unsupported(f"a variant of {type(dense).__name__} with other modules")
    return settings


def _unsupported(found: str) -> MoeeError:
    return MoeeError(
        "a plain VisionTransformer (ViT, DeiT) or ConvNeXt of timm's", found,
        "choose bundled, bundled_convnext, a DeiT, ViT or ConvNeXt without dropout",
    )  # fmt: skip


def _vit_settings(vit: VisionTransformer) -> dict[str, Any]:
    block, embed = vit.blocks[0], vit.patch_embed
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": _scale(block.ls1),
        "class_token": vit.has_class_token,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.num_reg_tokens,
        "pool_include_prefix": vit.pool_include_prefix,
        "act_layer": type(block.mlp.act),
    }


def _convnext_settings(convnext: ConvNeXt) -> dict[str, Any]:
    blocks = [stage.blocks for stage in convnext.stages]
    return {
        "in_chans": convnext.stem[0].in_channels,
        "num_classes": convnext.num_classes,
        "dims": tuple(each[0].mlp.fc1.in_features for each in blocks),
        "depths": tuple(map(len, blocks)),
        "kernel_sizes": tuple(each[0].conv_dw.kernel_size[0] for each in blocks),
        "patch_size": convnext.stem[0].kernel_size[0],
        "ls_init_value": _scale(blocks[0][0]),
        "conv_bias": convnext.stem[0].bias is not None,
    }


SETTINGS = {VisionTransformer: _vit_settings, ConvNeXt: _convnext_settings}
_SHAPES_ALONE = {VisionTransformer: {"weight_init": "skip"}}  # drawing takes long on that device


def _scale(scaled: nn.Module) -> float | None:
    """Where layer scales start: at the mean magnitude of what the dense model came to."""
    gamma = getattr(scaled, "gamma", None)
    return None if gamma is None else float(gamma.detach().abs().mean())


def _change_width(dense: nn.Module, settings: dict[str, Any], width: int) -> dict[str, Any]:
    """Arguments that differ in a model of another ``width``."""
    staged, most = isinstance(dense, ConvNeXt), dense.num_features
    sizes = settings["dims"] if staged else (settings["num_heads"],)
    if not 0 < width <= most or any(size * width % most for size in sizes):
        raise MoeeError(
            f"a width of at most {most} that leaves whole numbers of "
            f"{'channels in all stages' if staged else 'heads'}",
            str(width), f"try {most // 2}",
        )  # fmt: skip
    whole = tuple(size * width // most for size in sizes)
    return {"dims": whole} if staged else {"num_heads": whole[0], "embed_dim": width}


CHANNELS, BEFORE, INNER = "channels", "channels of the stage before", "inner units"
CLASSIFIERS = ("head", "head.fc")  # linear maps to the classes

UNITS = {
    "": (None, None, CHANNELS),  # embeddings (1, tokens, dim)
    "attn.qkv": (INNER, CHANNELS),
    "attn.proj": (CHANNELS, INNER),
    "mlp.fc1": (INNER, CHANNELS),
    "mlp.fc2": (CHANNELS, INNER),
    "downsample.0": (BEFORE,),
    "downsample.1": (CHANNELS, BEFORE),
    **dict.fromkeys(CLASSIFIERS, (None, CHANNELS)),
}
"""Kinds of units along the axes of a module's weight, by the end of its name; channels else."""


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
    tensors = {}
    for name, whole in model.state_dict().items():
        module = name.rpartition(".")[0]
        axes = UNITS.get(".".join(module.split(".")[-2:]), (CHANNELS,))
        tensors[name] = whole
        for axis, units in enumerate(axes[: whole.ndim]):
            if units is not None:
                times = 3 if module.endswith(".qkv") and units == INNER else 1
                own = torch.as_tensor(kept[_place(model, module, units)])
                offsets = torch.arange(times) * (whole.shape[axis] // times)
                ids = (offsets[:, None] + own).flatten().to(whole.device)
                tensors[name] = tensors[name].index_select(axis, ids)
    return tensors


def _place(model: nn.Module, module: str, units: str) -> str:
    """Where the ``units`` are that a module reads or writes."""
    if units == INNER:
        return module.rpartition(".")[0]
    stage = stage_of(model, module)
    if units == BEFORE:
        return f"stages.{int(stage.rpartition('.')[2]) - 1}"
    return stage
