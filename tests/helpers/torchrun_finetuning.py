"""A toy, fine-tuned under torchrun: ``torchrun ... -m tests.helpers.torchrun_finetuning OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from moee_analysis.extraction.pipeline import extract
from moee_analysis.training.finetune import finetune
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.utils.distributed import rank, together
from tests.helpers.makers import best, lively
from tests.helpers.toys import toy_images

CONFIG = FinetuneConfig(
    epochs=2, batch_size=6, learning_rate=1e-6, held_out=0.2, router="straight_through",
    block_weight=0.1, patience=9,
)  # fmt: skip


def main(out: Path) -> None:
    """Every process saves the model it has come to; the first one the run."""
    torch.set_num_threads(1)
    with together():
        run = extract(lively(), toy_images(16), best(macs_reduction=0.3))
        tuned = finetune(run, toy_images(20), CONFIG, out=out / "run")
        save_file(tuned.run.model.state_dict(), out / f"tuned-{rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
