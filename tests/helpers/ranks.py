"""Toys in many processes; with torchrun: ``torchrun ... -m tests.helpers.ranks OUT``."""

import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording, token_source
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.utils.distributed import rank, together
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_vit
from tests.helpers.processes import start
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
    token_source.PART = recording.BATCH = 8
    with together():
        for name in names:
            run = extract(toy_vit(), toy_images(44), RUNS[name])
            save_file(run.model.state_dict(), out / f"{name}-{rank()}.safetensors")


def tune_toy(out: Path) -> None:
    """Every process saves the model it has come to; the first one the run."""
    with together():
        run = extract(lively(), toy_images(16), best(macs_reduction=0.3))
        tuned = finetune(run, toy_images(20), TUNING, out=out / "run")
        save_file(tuned.run.model.state_dict(), out / f"tuned-{rank()}.safetensors")


def crash(out: Path) -> None:
    """After a run the second process fails, and the first one waits for it."""
    with together():
        take_apart(out, ["best"])
        if rank() == 1:
            raise MoeeError("a process that works", "one that does not", "ask why")
        take_apart(out, ["paper"])


def run_ranks(count: int, target: Callable[..., None], *arguments: Any) -> None:
    """Do something in so many processes that find each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(_as_rank, (rank, count, port), target, arguments) for rank in range(count)]
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [0] * count


def _as_rank(place: tuple[int, int, int], target: Callable[..., None], arguments: tuple) -> None:
    rank, count, port = map(str, place)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    target(*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    crash(Path(sys.argv[1]))
