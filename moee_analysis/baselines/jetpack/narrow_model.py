"""Narrower models of the same kind, with fresh random weights.

Vision transformers keep the dimensions of a head and get fewer heads; of ConvNeXts all stages are
narrowed alike.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError


def successor(
    dense: nn.Module, width: int | None = None, *, seed: int = 0, num_classes: int | None = None
) -> nn.Module:
    """Return a model like ``dense`` of another ``width``, with random weights, as timm starts it.

    It is in evaluation mode, on the device of ``dense``, and asks for gradients where that does.

    - ``width``: channels (of the last stage, where there are stages); None: those of ``dense``.
    - ``num_classes``: outputs; None: those of ``dense``. A model with others knows no names of
      classes.

    Raises ``MoeeError``: a model that is neither a plain vision transformer nor a plain ConvNeXt; a
    width without whole heads, or without whole stages.
    """
    settings = _settings(dense)
    classes = dense.num_classes if num_classes is None else num_classes
    changed = _at_width(dense, settings, width or dense.num_features)
    like = next(dense.parameters())
    changed |= _SHAPES_ALONE.get(type(dense), {}) if like.is_meta else {}
    with torch.device("meta" if like.is_meta else "cpu"):
        model = _build(type(dense), settings | changed | {"num_classes": classes}, seed)
    model.pretrained_cfg = _copy_cfg(dense, classes)
    return model.eval().requires_grad_(like.requires_grad).to(like.device, like.dtype)


def _build(kind: type[nn.Module], settings: dict[str, Any], seed: int) -> nn.Module:
    """Build a model; the state of torch's random numbers is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return kind(**settings)


def _copy_cfg(dense: nn.Module, classes: int) -> dict[str, Any]:
    """How images come in, and which classes go out; not whose weights these are."""
    others = {"architecture", "file", "url", "hf_hub_id", "tag"}
    if classes != dense.num_classes:
        others |= {"label_names"}
    kept = {k: v for k, v in dense.pretrained_cfg.items() if k not in others}
    return kept | {"num_classes": classes}


def _settings(dense: nn.Module) -> dict[str, Any]:
    """Arguments with which timm builds a model like ``dense``; checked module by module."""
    if type(dense) not in SETTINGS:
        raise _unsupported(f"a {type(dense).__name__}")
    try:
        settings = SETTINGS[type(dense)](dense)
        with torch.device("meta"):
            like = type(dense)(**settings, **_SHAPES_ALONE.get(type(dense), {}))
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        raise _unsupported(f"a variant ({error})") from None
    if repr(like) != repr(dense) or _shapes(like) != _shapes(dense):
        raise _unsupported(f"a variant of {type(dense).__name__} with other modules")
    return settings


def _unsupported(found: str) -> MoeeError:
    return MoeeError(
        "a plain VisionTransformer (ViT, DeiT) or ConvNeXt of timm's", found,
        "choose bundled, bundled_convnext, a DeiT, ViT or ConvNeXt without dropout",
    )  # fmt: skip


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _of_vit(vit: VisionTransformer) -> dict[str, Any]:
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


def _of_convnext(convnext: ConvNeXt) -> dict[str, Any]:
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


SETTINGS = {VisionTransformer: _of_vit, ConvNeXt: _of_convnext}
_SHAPES_ALONE = {VisionTransformer: {"weight_init": "skip"}}  # drawing takes long on that device


def _scale(scaled: nn.Module) -> float | None:
    """Where layer scales start: at the mean magnitude of what the dense model came to."""
    gamma = getattr(scaled, "gamma", None)
    return None if gamma is None else float(gamma.detach().abs().mean())


def _at_width(dense: nn.Module, settings: dict[str, Any], width: int) -> dict[str, Any]:
    """Arguments that differ in a model of another ``width``."""
    if isinstance(dense, ConvNeXt):
        sizes, name = settings["dims"], "dims"
    else:
        sizes, name = (settings["num_heads"],), "num_heads"
    scaled = [size * width / dense.num_features for size in sizes]
    if not 0 < width <= dense.num_features or any(each % 1 for each in scaled):
        raise MoeeError(
            f"a width of at most {dense.num_features} that leaves whole numbers of "
            f"{'channels in all stages' if name == 'dims' else 'heads'}",
            str(width),
            f"try {dense.num_features // 2}",
        )
    whole = tuple(int(each) for each in scaled)
    return {"dims": whole} if name == "dims" else {"num_heads": whole[0], "embed_dim": width}
