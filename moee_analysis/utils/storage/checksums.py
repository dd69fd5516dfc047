"""Checksums of what is kept, so that damage is seen before it is used.

A folder is sealed by a file that lists its files with their hashes; a file of tensors carries the
checksum of its own content.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import (
    check_file,
    checksum,
    file_hash,
    new_file,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Tensors = dict[str, torch.Tensor]

SEAL = "checksums.json"
CHECKSUM = "checksum"
"""Key of the checksum of JSON content, and of the facts beside tensors."""

_KNOWN: dict[tuple[int, ...], str] = {}


def seal(folder: Path, name: str, about: Mapping[str, Any] | None = None) -> None:
    """Write the checksums of all files in ``folder`` into it, and what to tell ``about`` it.

    ``name`` is the one that it will have: whole files in another place are damage too.
    """
    hashes = _hashes(folder, sorted(_names(folder)))
    write_signed(folder / SEAL, {"name": name, "files": hashes, "about": dict(about or {})})


def damage_of(folder: Path) -> str:
    """What of a sealed folder is not as it was written; "" if all is.

    Files that have not been touched since they were last looked at are not read again.
    """
    try:
        told = read_signed(folder / SEAL)
        name, files = told["name"], dict(told["files"])
    except (MoeeError, KeyError, TypeError, ValueError):
        return f"no whole {SEAL}"
    if name != folder.name:
        return f"what belongs to '{name}'"
    try:
        return _damage(folder, files)
    except MoeeError as error:
        return error.found
    except OSError as error:
        return str(error)


def _damage(folder: Path, files: Mapping[str, str]) -> str:
    strange = _names(folder) ^ files.keys()
    if strange:
        names = ", ".join(sorted(strange)[:3])
        return f"files that are missing or do not belong there: {names}"
    hashes = _hashes(folder, sorted(files))
    return ", ".join(f"{name} has changed" for name in files if hashes[name] != files[name])


def about(folder: Path) -> dict[str, Any]:
    """What was to be told about a sealed folder; nothing where it has no whole seal."""
    try:
        return dict(read_signed(folder / SEAL)["about"])
    except (MoeeError, KeyError, TypeError, ValueError):
        return {}


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON ``content`` with its checksum."""
    write_json(path, {**content, CHECKSUM: checksum(content)})


def read_signed(path: Path) -> dict[str, Any]:
    """Read JSON content that was written with its checksum, which is left out.

    Raises
    ------
    MoeeError
        No such file; one that is damaged or edited.
    """
    content = read_json(path, expected=f"'{path}' as it was written", hint="make it again")
    signed = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    if signed is None or signed != checksum(content):
        raise MoeeError(f"'{path}' as it was written", "a damaged or edited file", "make it again")
    return content


def write_tensors(path: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Write ``tensors`` and plain ``facts`` with their checksum; an older file stays until then."""
    text = json.dumps(dict(facts), sort_keys=True)
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    with new_file(path, wanted=wanted) as partial:
        metadata = {"facts": text, CHECKSUM: _digest(tensors, text)}
        save_file(tensors, partial, metadata=metadata)


def read_signed_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what :func:`write_tensors` has written: tensors and facts.

    Raises
    ------
    MoeeError
        A file that is damaged.
    """
    check_file(path, expected=f"'{path}' as it was written", hint="remove it, and make it again")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["facts"]
        if metadata[CHECKSUM] == _digest(tensors, text):
            return tensors, json.loads(text)
        found = "a damaged file"
    except (SafetensorError, OSError, KeyError) as error:
        found = str(error)
    raise MoeeError(f"'{path}' as it was written", found, "remove it, and make it again")


def _digest(tensors: Tensors, text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _names(folder: Path) -> set[str]:
    """Names of the files of a folder; hidden ones are left by other programs."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {SEAL}


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Hashes of some files, several at a time."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> str:
    check_file(path, expected="a file", hint="remove it")  # nobody waits for a named pipe
    there = path.stat()
    known = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
    if known not in _KNOWN:
        _KNOWN[known] = file_hash(path)
    return _KNOWN[known]
