"""What the paper of MoE Jetpack reports, and its models counted by this package's own counter.

Accuracies are top-1 in %, contributions as in the paper's figure. Pretrained models come from
ImageNet-21k. Layers are counted from 1 in the paper, and in `CONFIGURATIONS` as there.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.convert import convert
from moee_analysis.models.macs import count, count_parameters

COMPONENTS = pd.DataFrame(
    [
        ("dense", 73.9, 72.3, 62.4),
        ("Soft MoE", 77.1, 75.9, 70.8),
        ("+ checkpoint recycling", 78.4, 84.7, 91.2),
        ("+ SpheroMoE", 79.9, 88.4, 95.4),
    ],
    columns=["components", "ImageNet-1k", "CIFAR-100", "Flowers"],
)
"""ViT-T: what each component adds."""

METHODS = pd.DataFrame(
    [
        ("copy", 79.1),
        ("random", 79.5),
        ("uniform", 79.6),
        ("graph", 79.8),
        ("importance", 79.9),
    ],
    columns=["method", "ImageNet-1k"],
)
"""ViT-T: how experts are recycled; ``copy`` is Sparse Upcycling. No seeds are reported."""

DATA_SETS = pd.DataFrame(
    [
        ("ViT-T", "ImageNet-1k", 73.9, 75.6, 77.1, 79.9),
        ("ViT-T", "Food-101", 79.6, 86.9, 82.0, 89.5),
        ("ViT-T", "CIFAR-10", 92.4, 97.0, 92.9, 97.9),
        ("ViT-T", "CIFAR-100", 72.3, 81.4, 75.9, 88.4),
        ("ViT-T", "STL-10", 61.5, 83.4, 67.7, 95.3),
        ("ViT-T", "Flowers", 62.4, 81.9, 70.8, 95.4),
        ("ViT-T", "Pets", 25.0, 68.6, 45.5, 84.3),
        ("ViT-T", "DTD", 49.4, 62.5, 51.3, 69.1),
        ("ConvNeXt-F", "ImageNet-1k", 76.1, 76.4, 79.1, 80.5),
        ("ConvNeXt-F", "Food-101", 86.9, 89.0, 88.7, 90.7),
        ("ConvNeXt-F", "CIFAR-10", 96.6, 97.4, 97.3, 98.2),
        ("ConvNeXt-F", "CIFAR-100", 81.4, 84.4, 82.8, 88.5),
        ("ConvNeXt-F", "STL-10", 81.4, 92.3, 79.4, 98.7),
        ("ConvNeXt-F", "Flowers", 80.3, 94.5, 83.3, 98.6),
        ("ConvNeXt-F", "Pets", 72.9, 87.3, 77.4, 94.9),
        ("ConvNeXt-F", "DTD", 63.7, 68.8, 64.7, 79.5),
    ],
    columns=["model", "data set", "dense", "dense, pretrained", "Soft MoE", "Jetpack"],
)
"""Dense and Soft MoE from scratch, dense fine-tuned, and MoE Jetpack."""

CONTRIBUTIONS = pd.DataFrame(
    [
        (7, 1.71, 3.91),
        (8, 2.52, 4.16),
        (9, 3.78, 3.77),
        (10, 8.17, 6.71),
        (11, 17.66, 2.12),
        (12, 7.36, 0.77),
    ],
    columns=["layer", "core", "universal"],
)
"""V-JetMoE-T: what core and universal experts contribute, layer by layer, from 1."""


class Configuration(NamedTuple):
    """A model of the paper's, and its figures: parameters in millions, FLOPs in 10^9."""

    model: str
    start: str
    first_layer: int | None  # counted from 1; None: dense
    core: int
    universal: int
    params: float
    flops: float
    cifar100: float
    imagenet: float | None = None

    @property
    def heads(self) -> int:
        """Heads, of 64 dimensions each: 3 in ViT-T, 6 in ViT-S."""
        return 6 if self.model.endswith("S") else 3

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with experts, counted from 0."""
        return () if self.first_layer is None else tuple(range(self.first_layer - 1, DEPTH))


DEPTH = 12
CONFIGURATIONS = (
    Configuration("ViT-T", "scratch", None, 0, 0, 6, 1.1, 72.3, 73.9),
    Configuration("Soft MoE-T", "scratch", 7, 197, 0, 354, 1.2, 75.9, 77.1),
    Configuration("Soft MoE-S", "scratch", 7, 197, 0, 1412, 4.5, 77.5, 80.3),
    Configuration("ViT-T", "dense", None, 0, 0, 6, 1.1, 81.4, 75.5),
    Configuration("V-JetMoE-T", "dense", 11, 98, 196, 92, 1.1, 87.4),
    Configuration("V-JetMoE-T", "dense", 9, 98, 196, 179, 1.1, 87.8),
    Configuration("V-JetMoE-T", "dense", 5, 98, 196, 352, 1.2, 86.7),
    Configuration("V-JetMoE-T", "dense", 7, 32, 64, 89, 0.8, 87.8),
    Configuration("V-JetMoE-T", "dense", 7, 64, 128, 175, 1.0, 88.0),
    Configuration("V-JetMoE-T", "dense", 7, 98, 196, 265, 1.1, 88.4, 79.9),
    Configuration("V-JetMoE-S", "dense", 7, 98, 196, 1058, 4.3, 89.9, 82.4),
)
"""The table of configurations."""


def published() -> pd.DataFrame:
    """Return the paper's table of configurations, with what this package counts beside it.

    Returns
    -------
    DataFrame
        A row a model: ``model``; what it ``start``s from, scratch or a pretrained dense model;
        ``first_layer`` with experts, from 1, NA where there is none; ``core`` and ``universal``
        experts; the paper's ``params`` (10^6), ``flops`` (10^9), ``cifar100`` and ``imagenet``
        (top-1, %). Counted here, for ImageNet's 1000 classes: ``params_counted`` (10^6),
        ``macs_counted`` (10^9), and two parts of these that the paper's FLOPs leave out:
        ``macs_of_mixing`` (logits, dispatch and combine) and ``macs_of_attention`` (QK^T and AV).
        No weights are made for it.
    """
    rows = [row._asdict() | _counted(row) for row in CONFIGURATIONS]
    table = pd.DataFrame(rows).astype({"first_layer": "Int64"})
    table.attrs["caption"] = "Models of the MoE Jetpack paper, and their sizes counted again."
    return table


def _counted(row: Configuration) -> dict[str, float]:
    model = built(row)
    counted = count(model, sites=[])
    tokens, dim = model.pos_embed.shape[1:]
    mixing = 3 * tokens * dim * (row.core + row.universal) * len(row.layers)
    return {
        "params_counted": count_parameters(model) / 1e6,
        "macs_counted": counted.total / 1e9,
        "macs_of_mixing": mixing / 1e9,
        "macs_of_attention": 2 * tokens**2 * dim * DEPTH / 1e9,
    }


def built(row: Configuration) -> nn.Module:
    """Build a model of the paper's on the meta device: shapes alone, no memory."""
    with torch.device("meta"):
        dense = VisionTransformer(
            embed_dim=64 * row.heads, depth=DEPTH, num_heads=row.heads, global_pool="avg"
        )
    dense.pretrained_cfg = {"input_size": (3, 224, 224), "num_classes": dense.num_classes}
    if not row.layers:
        return dense.eval()
    config = JetpackConfig(
        layers=row.layers,
        core=row.core,
        universal=row.universal,
        method="uniform",
        router="soft" if row.model.startswith("Soft") else "sphero",
    )
    return convert(dense, None, config)
