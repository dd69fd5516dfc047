"""Runs on disk: one safetensors file, one JSON file, and a refusal of anything else.

The JSON carries a checksum of itself and of the tensors, so that a file that was cut short,
edited by hand or put together from two runs is refused instead of loading as a wrong model.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.saving.rebuild import describe, rebuild, stored_tensors
from moee_analysis.extraction.saving.schema import check_facts
from moee_analysis.models.state_dicts import read_tensors
from moee_analysis.utils.storage.files import checksum, file_hash, read_json, write_json
from moee_analysis.utils.storage.folders import new_folder
from moee_analysis.utils.storage.refusals import check_place, writing

FORMAT = 6
READABLE = (5, FORMAT)
"""Formats that can be read; 5 had neither answers nor arguments of ``timm.create_model``."""

KIND = "moee run"
TENSORS = "model.safetensors"
FACTS = "run.json"


def write_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Save a model with routed layers and plain JSON ``facts`` as ``folder``, all or nothing."""
    check_target(folder)
    with new_folder(folder) as partial:
        fill_run(partial, model, facts)


def fill_run(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write the two files of a run into an existing ``folder``."""
    tensors = stored_tensors(model)
    with writing(folder / TENSORS, wanted=sum(t.nbytes for t in tensors.values())):
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    content = {
        "kind": KIND,
        "format": FORMAT,
        "model": describe(model),
        "tensors_sha256": file_hash(folder / TENSORS),
        **facts,
    }
    facts = {**content, "checksum": checksum(content)}
    check_facts(json.loads(json.dumps(facts)), folder / FACTS)  # nothing that could not be loaded
    write_json(folder / FACTS, facts)


def read_run(folder: Path, *, dense: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model of a run, around the ``dense`` one where no name rebuilds that; its facts.

    Raises MoeeError: missing, truncated, foreign, edited or newer files; facts or tensors that
    make no sense; a network that answers otherwise than the one that was saved.
    """
    facts = _read_facts(folder)
    tensors, _ = read_tensors(folder / TENSORS)
    if file_hash(folder / TENSORS) != facts["tensors_sha256"]:
        raise MoeeError(
            f"the tensors that were saved with '{folder / FACTS}'",
            f"another content in {TENSORS}",
            "restore both files, or extract again",
        )
    return rebuild(facts["model"], tensors, dense=dense), facts


def check_target(folder: Path, *, wanted: int = 0) -> None:
    """Refuse to save over anything but an empty folder or an earlier run, of ``wanted`` bytes."""
    check_place(folder, wanted=wanted)
    if folder.exists() and not folder.is_dir():
        raise MoeeError(f"a folder at '{folder}'", "a file", "choose another place")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - {TENSORS, FACTS}:
        raise MoeeError(
            f"'{folder}' to be new, empty, or an earlier run",
            f"other files there ({', '.join(sorted(present)[:3])})",
            "choose another folder",
        )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    facts = read_json(
        path, expected=f"a run folder with {FACTS} and {TENSORS}",
        hint="check the path, restore the file, or extract again",
    )  # fmt: skip
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise MoeeError(f"the facts of a run in '{path}'", "another JSON file", "check the path")
    if facts.get("format") not in READABLE:
        raise MoeeError(
            f"run format {FORMAT} in '{path}'", f"format {facts.get('format')}",
            "load it with the version of this package that saved it",
        )  # fmt: skip
    try:
        content = {key: value for key, value in facts.items() if key != "checksum"}
        if facts.get("checksum") != checksum(content):
            raise MoeeError(
                f"'{path}' as it was saved", "a file edited since then",
                "restore the file, or extract again with other settings",
            )  # fmt: skip
        check_facts(facts, path)
    except RecursionError:
        raise MoeeError(
            f"the facts of a run in '{path}'", "lists too deep in each other", "check the path"
        ) from None
    return facts
