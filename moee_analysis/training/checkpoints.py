"""Where a training stands, on disk after every epoch: tensors as safetensors, the rest as JSON.

Both carry checksums. The history is a CSV beside them, which stays when the training has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
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
from moee_analysis.utils.storage.locks import OURS

FACTS = "checkpoint.json"
METRICS = "metrics.csv"

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """What a training has come to: ``rows`` of its history, epoch ``best`` of them, and its end.

    ``stopped`` says why it ended before its time; "" where it has not.
    """

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
        _save(folder, progress, groups, key)
    all_sum(torch.zeros(1))  # none goes on before it is there


def _save(folder: Path, progress: Progress, groups: Mapping[str, Tensors], key: str) -> None:
    tensors = {f"{group}/{name}": t for group, own in groups.items() for name, t in own.items()}
    file = f"checkpoint-{progress.epochs}.safetensors"
    copies = {  # a weight with several names is several tensors of the file
        name: t.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, t in tensors.items()
    }
    write_tensors(folder / file, copies, {"key": key, "epochs": progress.epochs})
    write_signed(folder / FACTS, {"key": key, "tensors": file, **asdict(progress)})
    write_text(folder / METRICS, pd.DataFrame(progress.rows).to_csv(index=False))
    for older in folder.glob("checkpoint-*.safetensors"):
        if older.name != file:
            older.unlink()


def read_checkpoint(folder: Path) -> tuple[Progress, dict[str, Tensors]] | None:
    """What was saved last in ``folder``, if anything was.

    Raises
    ------
    MoeeError
        A file that is damaged, or not of this checkpoint.
    """
    facts = checkpoint_facts(folder)
    if facts is None:
        return None
    progress = Progress(facts["rows"], facts["best"], facts["stopped"])
    tensors, of = read_signed_tensors(folder / facts["tensors"])
    if of != {"key": facts["key"], "epochs": progress.epochs}:
        raise MoeeError(f"the tensors of '{folder / FACTS}'", "others", "remove the checkpoint")
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = tensor
    return progress, groups


def remove_checkpoint(folder: Path) -> None:
    """Remove what :func:`save_checkpoint` has written, and the folder if nothing else is in it."""
    for pattern in ("checkpoint-*.safetensors", FACTS, METRICS, f".*{OURS}*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def checkpoint_facts(folder: Path) -> dict[str, Any] | None:
    """The JSON of the checkpoint in ``folder``; None where there is none.

    Raises
    ------
    MoeeError
        It is damaged.
    """
    path = folder / FACTS
    return read_signed(path) if path.exists() else None


def moments(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return what an optimizer keeps of every parameter, by the parameter's number and its name."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": t for number, own in state.items() for name, t in own.items()}


def load_moments(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give an optimizer of the same parameters back what :func:`moments` returned."""
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
