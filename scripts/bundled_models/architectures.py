"""The bundled models: their architectures, and how each is trained and looked into meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import layer_norm

from moee_analysis.data.scenes.canvas import SIDE
from moee_analysis.data.scenes.scene import CLASSES, SPLIT_SIZES
from moee_analysis.models.loading import BUNDLED_MODELS
from scripts.bundled_models.evaluation import GRID, PATCH


@dataclass(frozen=True)
class Architecture:
    """One of timm's architectures in the size of a bundled model.

    ``family`` is timm's module, ``kwargs`` the arguments of the class in `BUNDLED_MODELS`,
    ``classifier`` and ``first_conv`` are names of modules as in timm's ``pretrained_cfg``.
    """

    family: str
    kwargs: Mapping[str, object]
    classifier: str = "head.fc"
    first_conv: str = "patch_embed.proj"


_OUT = {"num_classes": len(CLASSES)}
_VIT = {"patch_size": PATCH, "embed_dim": 64, "depth": 12, "num_heads": 2, "mlp_ratio": 4.0}
_SWIN = {"patch_size": 4, "embed_dim": 32, "depths": (2, 6, 2), "num_heads": (1, 2, 4)}
_CONVNEXT = {"patch_size": 4, "dims": (32, 64, 128, 128), "depths": (2, 6, 2, 1)}

ARCHITECTURES = {
    "bundled": Architecture(
        "vision_transformer", {"img_size": SIDE} | _VIT | _OUT, classifier="head"
    ),
    "bundled_swin": Architecture(
        "swin_transformer",
        {"img_size": SIDE} | _SWIN | {"window_size": 4, "mlp_ratio": 4.0, "drop_path_rate": 0.0}
        | _OUT,
    ),
    "bundled_convnext": Architecture(
        "convnext", _CONVNEXT | {"ls_init_value": 1.0} | _OUT, first_conv="stem.0"
    ),
}  # fmt: skip
"""The bundled models by name."""


@dataclass(frozen=True)
class Recipe:
    """Everything a training depends on; the defaults made the bundled vision transformer."""

    epochs: int = 12
    whole_epochs: int = 2
    seed: int = 0
    train_images: int = SPLIT_SIZES["train"]
    evaluation_images: int = SPLIT_SIZES["evaluation"]
    calibration_images: int = SPLIT_SIZES["calibration"]
    batch_size: int = 96
    muon_rate: float = 2.5e-3
    adamw_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 0.2
    cooldown_epochs: int = 4
    label_smoothing: float = 0.05
    part_weight: float = 1.0
    free_epochs: int = 7
    patches_seen: int = GRID * GRID // 2
    gradient_norm: float = 1.0


_ALL_PATCHES = Recipe(whole_epochs=Recipe.epochs, patches_seen=GRID * GRID)
RECIPES = {"bundled": Recipe(), "bundled_swin": _ALL_PATCHES, "bundled_convnext": _ALL_PATCHES}
"""The training of each bundled model."""


def build(name: str = "bundled") -> nn.Module:
    """An untrained model, with the attention that trains fastest at few tokens on a CPU."""
    model = BUNDLED_MODELS[name](**ARCHITECTURES[name].kwargs)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def patch_width(model: nn.Module) -> int:
    """Width of the tokens that stand for one 8 x 8 patch each."""
    return model.feature_info[_patch_stage(model)]["num_chs"]


def logits(
    model: nn.Module, x: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits [n, classes], and normalised tokens [n, patches, width] of some patches.

    ``x`` are normalised pictures [n, 3, 64, 64], ``seen`` the indices of each one's patches, int64
    [n, patches]. A vision transformer drops all others at its entrance; a model in stages works on
    all of them and shows the tokens of the stage that has one for each patch.
    """
    seen = seen[..., None].expand(-1, -1, patch_width(model))
    if isinstance(model, VisionTransformer):
        tokens = model._pos_embed(model.patch_embed(x))
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, seen)], 1)
        tokens = model.norm(model.blocks(tokens))
        return model.head(tokens[:, 0]), tokens[:, 1:]
    final, maps = model.forward_intermediates(x, indices=[_patch_stage(model)])
    tokens = maps[0].flatten(2).transpose(1, 2)
    tokens = layer_norm(tokens, tokens.shape[-1:])
    return model.forward_head(final), tokens.gather(1, seen)


def _patch_stage(model: nn.Module) -> int:
    """The first stage (or block) of the model with one token for each patch."""
    return [info["reduction"] for info in model.feature_info].index(PATCH)
