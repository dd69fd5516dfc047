"""A toy, taken apart under torchrun: ``torchrun ... -m tests.helpers.torchrun_toy OUT [crash]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import calibration_set as calibration
from moee_analysis.extraction.record import recording
from moee_analysis.utils.distributed import rank, together
from tests.helpers.makers import best, quick
from tests.helpers.toys import toy_images, toy_vit

RUNS = {
    "best": best(macs_reduction=0.3),
    "bound": best(macs_reduction=0.1, params_reduction=0.25, order="obs", union="steps"),
    "paper": quick(macs_reduction=0.3, noise="drop"),
    "low_rank": best(macs_reduction=0.3, attention="low_rank"),
}


def main(out: Path, *, crashes: bool) -> None:
    """Every process saves its model; or the second one fails, and the first one waits for it."""
    torch.set_num_threads(1)
    calibration.PART = recording.BATCH = 8
    with together():
        if crashes and rank() == 1:
            raise MoeeError("a process that works", "one that does not", "ask why")
        for name, config in RUNS.items():
            run = extract(toy_vit(), toy_images(44), config)
            save_file(run.model.state_dict(), out / f"{name}-{rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), crashes="crash" in sys.argv)
