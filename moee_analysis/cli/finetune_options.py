"""Settings of ``FinetuneConfig`` on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moee_analysis.cli.values import among, part, real, seed, whole

if TYPE_CHECKING:
    from collections.abc import Callable

FINETUNE_OPTIONS: dict[str, tuple[Callable[[str], object], str]] = {
    "epochs": (whole(), "passes over the images (default: 10)"),
    "learning_rate": (real(above=0), "highest rate of AdamW (default: 1.5e-05)"),
    "batch_size": (whole(), "images of a step, over all processes (default: 32)"),
    "accumulate": (whole(), "parts that a step is computed in, for less memory (default: 1)"),
    "weight_decay": (real(least=0), "of AdamW (default: 0.01)"),
    "block_weight": (
        real(least=0),
        "of errors of the blocks' outputs, beside the logits (default: 0.0)",
    ),
    "router": (
        among("frozen", "straight_through", "auxiliary"),
        "frozen, straight_through or auxiliary (default: frozen)",
    ),
    "augmentation": (among("none", "light", "strong"), "none, light or strong (default: light)"),
    "ema": (part, "decay of a running mean of the weights; else the weights themselves"),
    "held_out": (part, "share of the images to watch and not to train on (default: 0.1)"),
    "patience": (whole(), "epochs without progress that end the training (default: 3)"),
    "precision": (
        among("auto", "float32", "bfloat16"),
        "auto, float32 or bfloat16 (default: auto)",
    ),
    "seed": (seed, "of order, augmentation and held-out images (default: 0)"),
}
"""Settings of ``FinetuneConfig`` that can be given, what they are and what they mean."""
