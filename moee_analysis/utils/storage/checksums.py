"""Checksums of stored files, so that damage is seen before it is used.

A folder is sealed by a list of its files with their hashes; a file of tensors carries its own.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage import files
from moee_analysis.utils.storage.files import check_file, checksum

Tensors = dict[str, torch.Tensor]

SEAL = "checksums.json"
CHECKSUM = "checksum"  # key of the checksum of JSON content, and of the facts beside tensors

_HASHES: dict[tuple[int, ...], str] = {}  # of files, not read again until they are touched


def seal(folder: Path, name: str, about: Mapping[str, Any] | None = None) -> None:
    """Write the checksums of all files in ``folder`` into it, and facts ``about`` it.

    ``name`` is the one that it will have: whole files in another place are damage too.
    """
    content = {"name": name, "files": _hashes(folder), "about": dict(about or {})}
    write_signed(folder / SEAL, content)


def read_seal(folder: Path) -> dict[str, Any]:
    """The name, the files and the facts of a sealed folder; nothing where its seal is not whole."""
    with suppress(MoeeError, ValueError):
        return read_signed(folder / SEAL)
    return {}


def damage_of(folder: Path) -> str:
    """Difference of a sealed folder from what was written; "" if there is none."""
    content = read_seal(folder)
    if not content.keys() >= {"name", "files"}:
        return f"no whole {SEAL}"
    if content["name"] != folder.name:
        return f"what belongs to '{content['name']}'"
    written = content["files"]
    try:
        if strange := sorted(_names(folder) ^ written.keys()):
            return f"files that are missing or do not belong there: {', '.join(strange[:3])}"
        hashes = _hashes(folder)
    except (MoeeError, OSError) as error:
        return getattr(error, "found", str(error))
    return ", ".join(f"{name} has changed" for name in written if hashes[name] != written[name])


def _names(folder: Path) -> set[str]:
    """Names of the files of a folder; hidden ones are left by other programs."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {SEAL}


def _hashes(folder: Path) -> dict[str, str]:
    names = sorted(_names(folder))
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> str:
    check_file(path, expected="a file", hint="remove it")  # nobody waits for a named pipe
    there = path.stat()
    state = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
    if state not in _HASHES:
        _HASHES[state] = files.file_hash(path)
    return _HASHES[state]


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON ``content`` with its checksum."""
    files.write_json(path, {**content, CHECKSUM: checksum(content)})


def read_signed(path: Path) -> dict[str, Any]:
    """Read JSON content that was written with its checksum, which is left out; or refuse it."""
    expected, hint = f"'{path}' as it was written", "make it again"
    content = files.read_json(path, expected=expected, hint=hint)
    signed = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    if signed is None or signed != checksum(content):
        raise MoeeError(expected, "a damaged or edited file", hint)
    return content


def write_tensors(path: Path, tensors: Tensors, facts: Mapping[str, Any]) -> None:
    """Write ``tensors`` and plain ``facts`` with their checksum; an older file stays until then."""
    text = json.dumps(dict(facts))
    with files.new_file(path, wanted=sum(tensor.nbytes for tensor in tensors.values())) as new:
        save_file(tensors, new, metadata={"facts": text, CHECKSUM: _digest(tensors, text)})


def read_signed_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read the tensors and facts that :func:`write_tensors` has written, or refuse the file."""
    expected, hint = f"'{path}' as it was written", "remove it, and make it again"
    tensors, metadata = read_safetensors(path, expected=expected, hint=hint)
    text = metadata.get("facts", "")
    if metadata.get(CHECKSUM) != _digest(tensors, text):
        raise MoeeError(expected, "a damaged file", hint)
    return tensors, json.loads(text)


def read_safetensors(path: Path, *, expected: str, hint: str) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of a whole safetensors file, or refuse it."""
    check_file(path, expected=expected, hint=hint)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MoeeError(expected, str(error), hint) from None


def _digest(tensors: Tensors, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
