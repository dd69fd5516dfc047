"""A small table for every finding, with numbers whose sentence is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

NAN = math.nan


def _rows(columns: str, *rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


def _kept(*experts: tuple[str, int, int, str]) -> pd.DataFrame:
    """Neurons of experts as text: ``x`` is kept, ``.`` is not."""
    return pd.DataFrame(
        {"system": system, "layer": layer, "expert": expert, "neuron": n, "kept": mark == "x"}
        for system, layer, expert, marks in experts
        for n, mark in enumerate(marks)
    )


def _pairs(columns: str, *rows: tuple) -> pd.DataFrame:
    """Pairs of experts a < b; the others, and an expert with itself, say nothing new."""
    table = _rows(f"system layer expert_a expert_b {columns}", *rows)
    itself = table.assign(expert_b=table["expert_a"], **dict.fromkeys(columns.split(), 1.0))
    return pd.concat([table, itself], ignore_index=True)


TABLES = {
    "accuracy": _rows(
        "system top1 retention kl reference_top1",
        ("dense", 0.9, 1.0, 0.0, 0.9), ("MoEE", 0.45, 0.5, 0.3, 0.9), ("random", 0.09, 0.1, 2, 0.9),
    ),
    "layers": _rows(
        "index converted experts noise_share active_fraction",
        (0, False, 0, NAN, NAN), (1, True, 4, 0.2, 0.5), (2, True, 7, 0.4, 0.25),
    ),
    "sizes": _rows(
        "system layer expert fraction active union",
        ("MoEE", 3, 0, 0.2, 0.3, 0.8), ("MoEE", 3, 1, 0.5, 0.3, 0.8), ("MoEE", 4, 0, 0.4, 0.4, 1.0),
    ),
    "neurons": _kept(("MoEE", 3, 0, "xx.."), ("MoEE", 3, 1, "x..."), ("MoEE", 5, 0, "xxxx")),
    "overlap": _pairs(
        "jaccard expected_jaccard", ("MoEE", 3, 0, 1, 0.5, 0.2), ("MoEE", 4, 0, 1, 0.1, 0.3)
    ),
    "embedding": _rows("layer cluster", (3, 0), (3, -1), (5, 0), (5, 1)),
    "surrogate": _rows(
        "layer data clusters noise_share",
        (3, "activations", 12, 0.2), (3, "surrogate", 2, 0.75),
    ),
    "macs": _rows(
        "component layer macs_dense macs params_dense params",
        ("mlps.0", 0, 3e8, 1e8, 2e6, 2e6), ("mlps.1", 1, 3e8, 3e8, 2e6, 2e6),
        ("total", -1, 1e9, 8e8, 5e6, 5.05e6),
    ),
    "routing": _rows(
        "system layer rank share n_experts",
        ("MoEE", 0, 0, 0.5, 4), ("MoEE", 0, 1, 0.2, 4), ("MoEE", 1, 0, 0.25, 4),
    ),
    "balance": _rows(
        "system layer metric value",
        ("MoEE", 0, "gini", 0.2), ("MoEE", 1, "gini", 0.4), ("MoEE", 0, "entropy", 0.9),
        ("random centres", 0, "gini", 0.3), ("random centres", 1, "gini", 0.3),
    ),
    "class_routing": _rows(
        "system layer class_name expert share share_all",
        ("MoEE", 3, "pug", 0, 0.3, 0.2), ("MoEE", 3, "pug", 1, 0.7, 0.8),
        ("MoEE", 9, "pug", 0, 0.2, 0.6), ("MoEE", 9, "plane", 1, 0.9, 0.4),
    ),
    "specificity": _rows(
        "system layer class_index js corrected null_high",
        ("MoEE", 0, -1, 0.02, 0.01, 0.03), ("MoEE", 5, -1, 0.3, 0.25, 0.04),
        ("MoEE", 5, 0, 0.9, 0.8, 0.1),
    ),
    "class_information": _rows(
        "system layer corrected p", ("MoEE", 0, 0.01, 0.3), ("MoEE", 5, 0.123, 0.01)
    ),
    "class_distance": _rows(
        "system layer class_index_a class_index_b class_a class_b js floor",
        ("MoEE", 3, 0, 0, "pug", "pug", 0.0, 0.0), ("MoEE", 3, 0, 1, "pug", "cliff", 0.6, 0.02),
        ("MoEE", 3, 1, 0, "cliff", "pug", 0.6, 0.02), ("MoEE", 3, 0, 2, "pug", "cat", 0.05, 0.01),
    ),
    "family_separation": _rows(
        "system layer auc null_high", ("MoEE", 0, 0.5, 0.6), ("MoEE", 1, 0.9, 0.6)
    ),
    "class_relatedness": _rows(
        "system layer spearman null_high", ("MoEE", 0, -0.1, 0.2), ("MoEE", 1, 0.4, 0.2)
    ),
    "modularity": _rows(
        "system layer ami class_null_high", ("MoEE", 0, 0.2, 0.1), ("MoEE", 1, 0.4, 0.1)
    ),
    "part_profile": _rows(
        "system layer expert part share share_all size",
        ("MoEE", 3, 0, "sky", 0.9, 0.4, 0.1), ("MoEE", 3, 1, "wheel", 0.5, 0.2, 0.3),
    ),
    "similarity": _pairs(
        "cosine cosine_centred", ("MoEE", 5, 0, 1, 0.9, -0.5), ("MoEE", 5, 0, 2, 0.5, 0.1)
    ),
    "similarity_summary": _rows(
        "system layer mean centred_mean near_orthogonal common_mean",
        ("MoEE", 0, 0.5, -0.1, 0.0, 0.6), ("MoEE", 1, 0.2, -0.1, 0.4, 0.3),
    ),
    "ablation": _rows(
        "recipe piece value direction kl",
        ("", "", "dense", "as it is", 0.0), ("best", "", "", "as it is", 0.01),
        ("best", "refit", "none", "off in turn", 0.5), ("best", "order", "a", "off in turn", 0.2),
        ("best", "", "random routing", "control", 0.9), ("paper", "", "", "as it is", 0.6),
        ("paper", "refit", "shared", "on alone", 0.1), ("paper", "order", "b", "on alone", NAN),
    ),
    "sweeps": _rows(
        "system sweep setting kl",
        ("MoEE", "experts", 4, 0.2), ("MoEE", "experts", 8, 0.1), ("static", "experts", 4, 0.0),
    ),
    "router_regret": _rows(
        "layer router error regret best",
        (0, "centre", 0.02, 0.01, 0.6), (1, "centre", 0.04, 0.01, 0.5), (0, "oracle", 0.01, 0, 1),
    ),
    "architectures": _rows(
        "model layer quantity value",
        ("ViT", 0, "experts", 4), ("ViT", 1, "experts", 9), ("Swin", 0, "experts", 7),
        ("ViT", 0, "class", 0.01), ("ViT", 1, "class", 0.2), ("ViT", 0, "similarity", 0.9),
    ),
    "architecture_variants": _rows(
        "model variant retention",
        ("ViT", "dense", 1.0), ("ViT", "best", 0.99), ("ViT", "best, random routing", 0.8),
    ),
    "fine_tuning": _rows(
        "system budget stage seed mean macs_reduction",
        ("MoEE", 0, "before", 0, 0.99, 0.28), ("MoEE", 1, "before", 0, 0.9, 0.45),
        ("MoEE", 1, "after", 0, 0.95, 0.45), ("MoEE", 1, "after", 1, 0.95, 0.45),
    ),
    "history": _rows(
        "epoch kl agreement", (0, 0.5, 0.8), (1, 0.2, 0.9), (2, 0.3, 0.88)
    ),
    "comparison": _rows(
        "system family macs_asked mean reduces_macs",
        ("best", "MoEE", 0.28, 0.98, True), ("paper", "MoEE", 0.28, 0.85, True),
        ("pruned", "static pruning", 0.28, 0.9, True), ("sparse", "Upcycling", 0.28, 1.0, False),
        ("unmade", "MoEE", 0.28, NAN, None),
    ),
    "routing_controls": _rows(
        "system macs_asked mean random_routing static_pruning",
        ("best", 0.28, 0.98, 0.8, 0.9), ("paper", 0.28, 0.5, 0.6, 0.9),
        ("pruned", 0.28, 0.9, NAN, 0.9),
    ),
    "learning_curves": _rows(
        "start images seed mean low high",
        ("a", 0, 0, 0.1, 0.0, 0.2), ("a", 64, 0, 0.6, 0.5, 0.7), ("b", 64, 0, 0.4, 0.3, 0.5),
    ),
    "learned": _rows(
        "start top1 low high level images",
        ("a", 0.6, 0.5, 0.7, 0.5, 30.0), ("b", 0.4, 0.3, 0.5, 0.5, NAN),
    ),
    "which_beats_which": _rows(
        "start_a start_b difference low high beats",
        ("a", "a", 0.0, 0.0, 0.0, False), ("a", "b", 0.2, 0.1, 0.3, True),
        ("b", "a", -0.2, -0.3, -0.1, False),
    ),
    "contributions": _rows(
        "layer group seed contribution",
        (6, "core", 0, 1.0), (6, "core", 1, 3.0), (7, "core", 0, 4.0), (6, "universal", 0, 0.5),
    ),
}  # fmt: skip

CHOICE = {3: np.array([[[0, 0], [1, 1]]])}
"""Experts of the patches of one picture of 2 x 2."""
