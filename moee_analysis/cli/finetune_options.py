"""Settings of ``FinetuneConfig`` on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FINETUNE_OPTIONS: dict[str, tuple[Callable[[str], object], str]] = {
    "epochs": (int, "passes over the images (default: 10)"),
    "learning_rate": (float, "highest rate of AdamW (default: 1.5e-05)"),
    "batch_size": (int, "images of a step, over all processes (default: 32)"),
    "accumulate": (int, "parts that a step is computed in, for less memory (default: 1)"),
    "weight_decay": (float, "of AdamW (default: 0.01)"),
    "block_weight": (float, "of errors of the blocks' outputs, beside the logits (default: 0.0)"),
    "router": (str, "frozen, straight_through or auxiliary (default: frozen)"),
    "augmentation": (str, "none, light or strong (default: light)"),
    "ema": (float, "decay of a running mean of the weights; else the weights themselves"),
    "held_out": (float, "share of the images to watch and not to train on (default: 0.1)"),
    "patience": (int, "epochs without progress that end the training (default: 3)"),
    "precision": (str, "auto, float32 or bfloat16 (default: auto)"),
    "seed": (int, "of order, augmentation and held-out images (default: 0)"),
}
"""Settings of ``FinetuneConfig`` that can be given, what they are and what they mean."""
