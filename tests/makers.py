"""Small models that timm can rebuild, settings that cluster in a second, folders of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from moee_analysis.clustering import ClusterConfig
from moee_analysis.config import ExtractConfig
from moee_analysis.models import build_model

if TYPE_CHECKING:
    from pathlib import Path

SMALL_VIT = "test_vit"  # timm's own test model: 6 blocks of width 64, 100 tokens and CLS
SMALL_CONVNEXT = "test_convnext"

CLUSTERING = ClusterConfig(
    reduce="pca", components=4, min_samples=3, min_cluster_size=0.05, max_cluster_size=0.6,
    max_noise=0.95,
)  # fmt: skip


def lively(name: str = SMALL_VIT, *, seed: int = 0, **settings):
    """A timm model with weights large enough for its layers to disagree about tokens."""
    torch.manual_seed(seed)
    model = build_model(name, **settings)
    for key, parameter in model.named_parameters():
        if key.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(requires_grad=False)


def quick(**settings) -> ExtractConfig:
    """A configuration that takes a small model apart in well under a second."""
    defaults = {"tokens_per_image": 6, "cluster_tokens": 200, "clustering": CLUSTERING}
    if "macs_reduction" not in settings:
        defaults["variance_kept"] = 0.8
    return ExtractConfig(**{**defaults, **settings})


def picture(seed: int, *, size: int = 32, mode: str = "RGB") -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def image_folder(root: Path, classes: dict[str, int]) -> Path:
    """``root`` filled with so many pictures for each class folder."""
    for number, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            picture(1000 * number + index).save(folder / f"{index}.png")
    return root


def pixels_of(model, *, count: int = 4, seed: int = 0) -> torch.Tensor:
    """Random input of the size that ``model`` wants."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *model.pretrained_cfg["input_size"], generator=generator)


def hooks_of(model) -> int:
    """Number of hooks on any module of ``model``."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of ``folder`` hold."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_models(one, other) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
