"""Where a training stands, on disk after every epoch: tensors as safetensors, the rest as JSON.

Both carry checksums. The history is a CSV beside them, which stays when the training has ended.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.utils.distributed import all_sum, rank
from moee_analysis.utils.storage.checksums import (
    read_signed,
    read_signed_tensors,
    write_signed,
    write_tensors,
)
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.folders import held_folder
from moee_analysis.utils.storage.locks import OURS
from moee_analysis.utils.storage.store import set_aside

FACTS = "checkpoint.json"
METRICS = "metrics.csv"

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """The ``rows`` of a training's history, the ``best`` epoch, and why it ``stopped`` early."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def epochs(self) -> int:
        """Whole epochs that are done; the first row is of the model before any."""
        return len(self.rows) - 1


def save_checkpoint(
    folder: Path, progress: Progress, groups: Mapping[str, Tensors], *, key: str
) -> None:
    """Save ``groups`` of tensors and the ``progress``; the checkpoint before is there until then.

    ``key`` says of which training it is. Of several processes the first one saves, for all.
    """
    if rank() == 0:
        file = f"checkpoint-{progress.epochs}.safetensors"
        copies = {  # a weight with several names is several tensors of the file
            f"{group}/{name}": t.detach().clone(memory_format=torch.contiguous_format).cpu()
            for group, own in groups.items()
            for name, t in own.items()
        }
        write_tensors(folder / file, copies, {"key": key, "epochs": progress.epochs})
        write_signed(folder / FACTS, {"key": key, "tensors": file, **asdict(progress)})
        write_text(folder / METRICS, pd.DataFrame(progress.rows).to_csv(index=False))
        for older in set(folder.glob("checkpoint-*.safetensors")) - {folder / file}:
            older.unlink()
    all_sum(torch.zeros(1))  # none goes on before it is there


def read_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensors]] | None:
    """Return what was saved last in ``folder``, if anything was.

    Raises ``MoeeError``: a file that is damaged, or not of this checkpoint.
    """
    if not (folder / FACTS).exists():
        return None
    facts = read_signed(folder / FACTS)
    progress = Progress(facts["rows"], facts["best"], facts["stopped"])
    tensors, about = read_signed_tensors(folder / facts["tensors"])
    if about != {"key": facts["key"], "epochs": progress.epochs}:
        raise MoeeError(f"the tensors of '{folder / FACTS}'", "others", "remove the checkpoint")
    return progress, _nest(tensors, "/")


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of :func:`save_checkpoint`, and the folder if nothing else is in it."""
    for pattern in ("checkpoint-*.safetensors", FACTS, METRICS, f".*{OURS}*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def hold_checkpoint(folder: Path, key: str) -> Iterator[None]:
    """Hold the folder of a checkpoint; a damaged one is set aside, an empty one goes in the end.

    Raises ``MoeeError``: it has the checkpoint of another training.
    """
    with held_folder(folder):
        try:
            read_checkpoint(folder)
        except MoeeError as damage:
            set_aside(folder, damage.found, seen=folder.lstat())
    with held_folder(folder):  # made anew where it was
        try:
            if (folder / FACTS).exists() and read_signed(folder / FACTS)["key"] != key:
                raise MoeeError(
                    f"the fine-tuning that was begun in '{folder}'",
                    "another run, other images or other settings",
                    "repeat it as it was, remove that folder, or choose another one",
                )
            yield
        finally:
            if not (folder / FACTS).exists():
                remove_checkpoint(folder)


def moments(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return what an optimizer keeps of every parameter, by the parameter's number and its name."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": t for number, own in state.items() for name, t in own.items()}


def load_moments(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give an optimizer of the same parameters back what :func:`moments` returned."""
    state = {int(number): own for number, own in _nest(tensors, ".").items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _nest(tensors: Tensors, separator: str) -> dict[str, Tensors]:
    """Tensors by the part of their name before the ``separator``, then by the rest."""
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition(separator)
        groups.setdefault(group, {})[own] = tensor
    return groups
