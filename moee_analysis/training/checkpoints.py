"""Where a training stands, on disk after every epoch: tensors and facts in a file with a checksum.

The history is a CSV beside it, which stays when the training has ended.
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
from moee_analysis.utils.storage.checksums import Tensors, read_signed_tensors, write_tensors
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.folders import held_folder
from moee_analysis.utils.storage.locks import OURS
from moee_analysis.utils.storage.store import set_aside

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.csv"
COLUMNS = ("epoch", "steps", "loss", "kl", "agreement")


@dataclass
class Progress:
    """The ``rows`` of a training's history, the ``best`` epoch, and why it ``stopped`` early.

    ``key`` says which training it is.
    """

    key: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def epochs(self) -> int:
        """Whole epochs that are done; the first row is of the model before any."""
        return len(self.rows) - 1


def save_checkpoint(folder: Path, progress: Progress, groups: Mapping[str, Tensors]) -> None:
    """Save ``groups`` of tensors and the ``progress``; the checkpoint before is there until then.

    Of several processes the first one saves, for all.
    """
    if rank() == 0:
        copies = {  # a weight with several names is several tensors of the file
            f"{group}/{name}": t.detach().clone(memory_format=torch.contiguous_format).cpu()
            for group, own in groups.items()
            for name, t in own.items()
        }
        write_tensors(folder / CHECKPOINT, copies, asdict(progress))
        write_text(folder / METRICS, pd.DataFrame(progress.rows).to_csv(index=False))
    all_sum(torch.zeros(1))  # none goes on before it is there


def read_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensors]] | None:
    """Return what was saved last in ``folder``, if anything was; a damaged one raises MoeeError."""
    if not any((folder / name).exists() for name in (CHECKPOINT, METRICS)):
        return None
    tensors, facts = read_signed_tensors(folder / CHECKPOINT)
    rows = [{name: row[name] for name in COLUMNS} for row in facts["rows"]]  # in their order
    return Progress(**facts | {"rows": rows}), _nest(tensors, "/")


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of :func:`save_checkpoint`, and the folder if nothing else is in it."""
    for pattern in (METRICS, "checkpoint*", f".*{OURS}*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def hold_checkpoint(folder: Path) -> Iterator[None]:
    """Hold the folder of a checkpoint; a damaged one is set aside, an empty one goes in the end."""
    with held_folder(folder):
        try:
            read_checkpoint(folder)
        except MoeeError as damage:
            set_aside(folder, damage.found, seen=folder.lstat())
    with held_folder(folder):  # made anew where it was
        try:
            yield
        finally:
            if not (folder / CHECKPOINT).exists():
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
