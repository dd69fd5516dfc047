"""What the paper of MoE Jetpack reports, and its models counted by this package's own counter.

``published.json`` holds three of its tables: accuracies are top-1 in %, contributions as in its
figure. Pretrained models come from ImageNet-21k, layers are counted from 1.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm import create_model
from torch import nn

from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.convert import convert
from moee_analysis.models.macs import count, count_parameters

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())

METHODS = pd.DataFrame(**_TABLES["methods"])
"""ViT-T: how experts are recycled; ``copy`` is Sparse Upcycling. No seeds are reported."""

CONTRIBUTIONS = pd.DataFrame(**_TABLES["contributions"])
"""V-JetMoE-T: what core and universal experts contribute, layer by layer."""

CONFIGURATIONS = pd.DataFrame(**_TABLES["configurations"]).astype({"first_layer": "Int64"})
"""Models of the paper's: experts from ``first_layer`` on, NA where there are none."""

DEPTH = 12


def published() -> pd.DataFrame:
    """Return :data:`CONFIGURATIONS`, with what this package counts beside them.

    Columns: ``model``; what it ``start``s from, scratch or a pretrained dense model;
    ``first_layer``; ``core`` and ``universal`` experts; the paper's ``params`` (10^6), ``flops``
    (10^9), ``cifar100`` and ``imagenet`` (top-1, %). Counted here, for 1000 classes:
    ``params_counted`` (10^6), ``macs_counted`` (10^9), and two parts of these that the paper leaves
    out: ``macs_of_mixing`` (logits, dispatch, combine) and ``macs_of_attention`` (QK^T and AV).
    """
    counted = pd.DataFrame([_count(row) for row in CONFIGURATIONS.itertuples()])
    table = pd.concat([CONFIGURATIONS, counted], axis=1)
    table.attrs["caption"] = "Models of the MoE Jetpack paper, and their sizes counted again."
    return table


def _count(row: Any) -> dict[str, float]:
    model = build(row)
    tokens, dim = model.pos_embed.shape[1:]
    mixing = 3 * tokens * dim * (row.core + row.universal) * len(layers_of(row))
    return {
        "params_counted": count_parameters(model) / 1e6,
        "macs_counted": count(model, sites=[]).total / 1e9,
        "macs_of_mixing": mixing / 1e9,
        "macs_of_attention": 2 * tokens**2 * dim * DEPTH / 1e9,
    }


def layers_of(row: Any) -> tuple[int, ...]:
    """Layers with experts of a row of :data:`CONFIGURATIONS`, counted from 0."""
    return () if pd.isna(row.first_layer) else tuple(range(row.first_layer - 1, DEPTH))


def build(row: Any) -> nn.Module:
    """Build a row of :data:`CONFIGURATIONS` on the meta device: shapes alone, no memory."""
    size = "small" if row.model.endswith("S") else "tiny"
    with torch.device("meta"):  # where drawing takes long
        dense = create_model(f"vit_{size}_patch16_224", global_pool="avg", weight_init="skip")
    if not layers_of(row):
        return dense.eval()
    router = "soft" if row.model.startswith("Soft") else "sphero"
    experts = {"layers": layers_of(row), "core": row.core, "universal": row.universal}
    return convert(dense, None, JetpackConfig(method="uniform", router=router, **experts))
