"""Files that are read whole or refused, and that appear complete or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.locks import temporary, temporary_prefix
from moee_analysis.utils.storage.refusals import bytes_text, writing

ODD = {"is_dir": "a folder", "is_fifo": "a named pipe", "is_socket": "a socket",
       "is_char_device": "a device", "is_block_device": "a device"}  # fmt: skip
LARGEST_TEXT = 1 << 28  # bytes; nothing here writes more


def check_file(path: Path, *, expected: str, hint: str = "check the path") -> None:
    """Refuse a path at which there is no regular file to read; nothing waits, as for a pipe."""
    try:
        if path.is_file():
            path.open("rb").close()
            return
        odd = next((words for kind, words in ODD.items() if getattr(path, kind)()), "no such file")
    except (OSError, ValueError) as error:
        odd = f"what cannot be read ({error})"
    raise MoeeError(expected, f"{odd} at '{path}'", hint)


def read_text(path: Path, *, expected: str, hint: str = "check the path") -> str:
    """Read a text file in UTF-8, or refuse it; ``expected`` is the name for it in the error."""
    check_file(path, expected=expected, hint=hint)
    try:
        size = path.stat().st_size
        if size <= LARGEST_TEXT:
            return path.read_text(encoding="utf-8-sig")  # some editors mark UTF-8
        found = f"{bytes_text(size)} in '{path}'"
    except OSError as error:  # it is gone, or its disk fails
        found = f"'{path}', which cannot be read ({error})"
    except UnicodeDecodeError as error:
        found = f"no text in '{path}' ({error.reason})"
    raise MoeeError(expected, found, hint)


def read_json(path: Path, *, expected: str, hint: str = "check the path") -> Any:
    """Read a complete JSON file as :func:`read_text` does; infinity and NaN are no JSON."""
    text = read_text(path, expected=expected, hint=hint)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MoeeError(f"complete JSON in '{path}'", str(error), hint) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 to a :func:`new_file`."""
    with new_file(path, wanted=len(text.encode())) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_file(path: Path, *, wanted: int = 0) -> Iterator[Path]:
    """Give a temporary file that becomes ``path`` on success and vanishes on failure.

    An older file stays until the new one, of about ``wanted`` bytes, is flushed to the disk. A
    folder that is missing, full or closed raises a ``MoeeError``.
    """
    touch = partial(Path.touch, mode=0o600, exist_ok=False)
    with writing(path, wanted=wanted), temporary(temporary_prefix(path), touch) as new:
        yield new
        new.chmod(0o644)
        flush(new)
        new.replace(path)
        flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not all can do it for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(content: Any) -> str:
    """SHA-256 of plain JSON values, in hex; the order of keys does not count."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
