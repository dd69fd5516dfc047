"""Toys under torchrun: ``torchrun ... -m tests.helpers.torchrun extract|finetune|crash OUT``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record import token_source as calibration
from moee_analysis.training.finetune import finetune
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.utils.distributed import rank, together
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_vit
from tests.helpers.runs import best, quick

RUNS = {
    "best": best(macs_reduction=0.3),
    "bound": best(macs_reduction=0.1, params_reduction=0.25, order="obs"),
    "paper": quick(macs_reduction=0.3, noise="drop"),
    "low_rank": best(macs_reduction=0.3, attention="low_rank"),
}
TUNING = FinetuneConfig(
    epochs=2, batch_size=6, learning_rate=1e-6, held_out=0.2, router="straight_through",
    block_weight=0.1, patience=9,
)  # fmt: skip


def take_apart(out: Path, names: Iterable[str] = RUNS) -> None:
    """Every process saves its models."""
    calibration.PART = recording.BATCH = 8
    for name in names:
        run = extract(toy_vit(), toy_images(44), RUNS[name])
        save_file(run.model.state_dict(), out / f"{name}-{rank()}.safetensors")


def tune(out: Path) -> None:
    """Every process saves the model it has come to; the first one the run."""
    run = extract(lively(), toy_images(16), best(macs_reduction=0.3))
    tuned = finetune(run, toy_images(20), TUNING, out=out / "run")
    save_file(tuned.run.model.state_dict(), out / f"tuned-{rank()}.safetensors")


def crash(out: Path) -> None:
    """After a run the second process fails, and the first one waits for it."""
    take_apart(out, ["best"])
    if rank() == 1:
        raise MoeeError("a process that works", "one that does not", "ask why")
    take_apart(out, ["paper"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with together():
        {"extract": take_apart, "finetune": tune, "crash": crash}[sys.argv[1]](Path(sys.argv[2]))
