"""What the paper of MoE Jetpack reports, and its models counted by this package's own counter.

``published.json`` holds its tables: accuracies are top-1 in %, contributions as in the paper's
figure, ``params`` millions and ``flops`` 10^9. Pretrained models come from ImageNet-21k. Layers are
counted from 1, as in the paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.convert import convert
from moee_analysis.models.macs import count, count_parameters

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())

COMPONENTS = pd.DataFrame(**_TABLES["components"])
"""ViT-T: what each component adds."""

METHODS = pd.DataFrame(**_TABLES["methods"])
"""ViT-T: how experts are recycled; ``copy`` is Sparse Upcycling. No seeds are reported."""

DATA_SETS = pd.DataFrame(**_TABLES["data_sets"])
"""Dense and Soft MoE from scratch, dense fine-tuned, and MoE Jetpack."""

CONTRIBUTIONS = pd.DataFrame(**_TABLES["contributions"])
"""V-JetMoE-T: what core and universal experts contribute, layer by layer."""

DEPTH = 12


class Configuration(NamedTuple):
    """A model of the paper's, and its figures."""

    model: str
    start: str
    first_layer: int | None  # with experts; None: dense
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


CONFIGURATIONS = tuple(Configuration(*row) for row in _TABLES["configurations"]["data"])
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
    model = build(row)
    tokens, dim = model.pos_embed.shape[1:]
    mixing = 3 * tokens * dim * (row.core + row.universal) * len(row.layers)
    return {
        "params_counted": count_parameters(model) / 1e6,
        "macs_counted": count(model, sites=[]).total / 1e9,
        "macs_of_mixing": mixing / 1e9,
        "macs_of_attention": 2 * tokens**2 * dim * DEPTH / 1e9,
    }


def build(row: Configuration) -> nn.Module:
    """Build a model of the paper's on the meta device: shapes alone, no memory."""
    with torch.device("meta"):
        dense = VisionTransformer(
            embed_dim=64 * row.heads, depth=DEPTH, num_heads=row.heads, global_pool="avg",
            weight_init="skip",  # drawing takes long on that device
        )  # fmt: skip
    dense.pretrained_cfg = {"input_size": (3, 224, 224), "num_classes": dense.num_classes}
    if not row.layers:
        return dense.eval()
    router = "soft" if row.model.startswith("Soft") else "sphero"
    experts = {"layers": row.layers, "core": row.core, "universal": row.universal}
    return convert(dense, None, JetpackConfig(method="uniform", router=router, **experts))
