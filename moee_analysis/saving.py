"""Runs on disk: one safetensors file, one JSON file, and a refusal of anything else.

The JSON carries a checksum of itself and of the tensors, so that a file that was cut short,
edited by hand or put together from two runs is refused instead of loading as a wrong model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.rebuilding import describe, rebuild, stored_tensors
from moee_analysis.store import check_place, new_folder, write_json
from moee_analysis.weights import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

FORMAT = 6
READABLE = (5, FORMAT)
"""Formats that can be read; 5 had neither answers nor arguments of ``timm.create_model``."""

KIND = "moee run"
TENSORS = "model.safetensors"
FACTS = "run.json"


@dataclass(frozen=True)
class SavedRun:
    """What a run folder holds: the rebuilt model and the facts saved beside it."""

    model: nn.Module
    facts: dict[str, Any]


def write_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Save a model with routed layers and plain JSON ``facts`` as ``folder``, all or nothing.

    Raises
    ------
    MoeeError
        The folder holds something that is not an earlier run; a router that cannot be saved.
    """
    check_target(folder)
    with new_folder(folder) as partial:
        fill_run(partial, model, facts)


def fill_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write the two files of a run into an existing ``folder``."""
    save_file(stored_tensors(model), folder / TENSORS, metadata={"format": "pt"})
    (folder / TENSORS).chmod(0o644)  # safetensors gives it to its owner alone
    content = {
        "kind": KIND,
        "format": FORMAT,
        "model": describe(model),
        "tensors_sha256": _file_hash(folder / TENSORS),
        **facts,
    }
    write_json(folder / FACTS, {**content, "checksum": _checksum(content)})


def read_run(folder: Path, *, dense: nn.Module | None = None) -> SavedRun:
    """Load a run folder, around the ``dense`` model it was made from where no name rebuilds that.

    Raises
    ------
    MoeeError
        Missing, truncated, foreign, edited or newer files; a network that answers otherwise than
        the one that was saved.
    """
    facts = _read_facts(folder)
    tensors, _ = read_tensors(folder / TENSORS)
    if _file_hash(folder / TENSORS) != facts["tensors_sha256"]:
        raise MoeeError(
            f"the tensors that were saved with '{folder / FACTS}'",
            f"another content in {TENSORS}",
            "restore both files, or extract again",
        )
    return SavedRun(rebuild(facts["model"], tensors, dense=dense), facts)


def check_target(folder: Path) -> None:
    """Refuse to save over anything but an empty folder or an earlier run."""
    if folder.exists() and not folder.is_dir():
        raise MoeeError(f"a folder at '{folder}'", "a file", "choose another place")
    check_place(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - {TENSORS, FACTS}:
        raise MoeeError(
            f"'{folder}' to be new, empty, or an earlier run",
            f"other files there ({', '.join(sorted(present)[:3])})",
            "choose another folder",
        )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text())
    except OSError:
        raise MoeeError(
            f"a run folder with {FACTS} and {TENSORS}",
            f"no {FACTS} in '{folder}'",
            "check the path",
        ) from None
    except ValueError as error:
        raise MoeeError(
            f"complete JSON in '{path}'", str(error), "restore the file, or extract again"
        ) from None
    _check_facts(facts, path)
    return facts


def _check_facts(facts: Any, path: Path) -> None:
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise MoeeError(f"the facts of a run in '{path}'", "another JSON file", "check the path")
    if facts.get("format") not in READABLE:
        raise MoeeError(
            f"run format {FORMAT} in '{path}'", f"format {facts.get('format')}",
            "load it with the version of this package that saved it",
        )  # fmt: skip
    content = {key: value for key, value in facts.items() if key != "checksum"}
    if facts.get("checksum") != _checksum(content):
        raise MoeeError(
            f"'{path}' as it was saved", "a file edited since then",
            "restore the file, or extract again with other settings",
        )  # fmt: skip


def _checksum(content: dict[str, Any]) -> str:
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
