"""Files that are read whole or refused, and that appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import undisturbed
from moee_analysis.utils.storage.locks import (
    OURS,
    RANDOM,
    made_and_held,
    remove_left,
    temporary_prefix,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
           errno.EEXIST, errno.ENAMETOOLONG, errno.EIO)  # fmt: skip
ODD = {"is_dir": "a folder", "is_fifo": "a named pipe", "is_socket": "a socket",
       "is_char_device": "a device", "is_block_device": "a device"}  # fmt: skip
DISK_ERRORS = (OSError, SafetensorError)
"""As which the refusals of a disk come; others come as these too."""

TRIAL = 1 << 16  # bytes
LARGEST_TEXT = 1 << 28  # bytes; nothing here writes more
ROOM = "make room there, or choose another place"
ANOTHER_PLACE = "choose a place that can be written to"


def read_text(path: Path, *, expected: str, hint: str = "check the path") -> str:
    """Read a text file in UTF-8 of which ``expected`` says what it is.

    Raises
    ------
    MoeeError
        No such file, something else than a file, one that cannot be read or is no text.
    """
    check_file(path, expected=expected, hint=hint)
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise MoeeError(expected, f"{bytes_text(path.stat().st_size)} in '{path}'", hint)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoeeError(expected, f"'{path}', which cannot be read ({error})", hint) from None
    except UnicodeDecodeError as error:
        raise MoeeError(expected, f"no text in '{path}' ({error.reason})", hint) from None


def check_file(path: Path, *, expected: str, hint: str = "check the path") -> None:
    """Refuse a path at which there is no regular file; nothing is read, so nothing waits.

    Raises
    ------
    MoeeError
        It says what there is instead.
    """
    try:
        there = path.is_file()
        odd = next((told for kind, told in ODD.items() if getattr(path, kind)()), "no such file")
    except (OSError, ValueError) as error:
        there, odd = False, str(error)
    if not there:
        raise MoeeError(expected, f"{odd} at '{path}'", hint)


def read_json(path: Path, *, expected: str, hint: str = "check the path") -> Any:
    """Read a JSON file of which ``expected`` says what it is; infinity and NaN are no JSON.

    Raises
    ------
    MoeeError
        What :func:`read_text` refuses; anything but complete JSON, or nested too deep.
    """
    text = read_text(path, expected=expected, hint=hint)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MoeeError(f"complete JSON in '{path}'", str(error), hint) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number of JSON")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON; an older file stays until it is complete.

    Raises
    ------
    MoeeError
        The folder is missing, cannot be written to or is full.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8; an older file stays until it is complete.

    Raises
    ------
    MoeeError
        The folder is missing, cannot be written to or is full.
    """
    with new_file(path, wanted=len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_file(path: Path, *, wanted: int = 0) -> Iterator[Path]:
    """Give a temporary file that becomes ``path`` on success and vanishes on failure.

    An older file stays untouched until the new one is complete, of about ``wanted`` bytes, and
    flushed to the disk.

    Raises
    ------
    MoeeError
        The folder is missing, cannot be written to or is full.
    """
    with writing(path, wanted=wanted):
        prefix = temporary_prefix(path.name)
        remove_left(path.parent, re.escape(prefix) + RANDOM)
        with ExitStack() as stack:
            with undisturbed():
                new = path.with_name(prefix + uuid4().hex)
                partial, lock = made_and_held(lambda: _empty_file(new))
                stack.callback(_remove, partial, lock)
            yield partial
            partial.chmod(0o644)
            flush(partial)
            partial.replace(path)
            flush(path.parent)


def _remove(partial: Path, lock: int) -> None:
    with undisturbed():
        partial.unlink(missing_ok=True)
        os.close(lock)


def _empty_file(path: Path) -> Path:
    path.touch(0o600, exist_ok=False)
    return path


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not all can do it for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def writing(place: Path, *, wanted: int = 0, hint: str = "") -> Iterator[None]:
    """While open, what a disk refuses is told in one line: the folder, what is free and wanted.

    Raises
    ------
    MoeeError
        ``place``, of about ``wanted`` bytes (0: nobody knows), cannot be written.
    """
    try:
        yield
    except DISK_ERRORS as error:
        told = refusal(error, place, wanted=bytes_text(wanted) if wanted else "", hint=hint)
        raise told or error from None


def refusal(error: Exception, place: Path, *, wanted: str = "", hint: str = "") -> MoeeError | None:
    """What is said of an ``error`` that a disk has caused while ``place`` was written, if it has.

    ``wanted`` is a size, in words. Without a ``hint`` it is about room, or another place.
    """
    code, place = _code(error), named_finally(place)
    if code in FULL:
        room = f"{wanted} of room" if wanted else "room"
        return MoeeError(
            f"{room} for '{place}'", f"{_free(place)} ({os.strerror(code)})", hint or ROOM
        )
    if code in REFUSED and _concerns(error, place):
        return MoeeError(f"a place to write '{place}'", str(error), hint or ANOTHER_PLACE)
    return None


def named_finally(place: Path) -> Path:
    """The path that something in a temporary file or folder will have."""
    return Path(re.sub(rf"(?<=/)\.([^/]+){OURS}{RANDOM}(?=/|$)", r"\1", str(place)))


def _concerns(error: Exception, place: Path) -> bool:
    """Whether an error is about a place, as far as it says so, or the folders that it is in."""
    named = getattr(error, "filename", None)
    if named is None or error.errno == errno.ENAMETOOLONG or OURS in str(named):
        return True
    within = Path(named).absolute().is_relative_to(place.absolute())
    return within or Path(named).absolute() in place.absolute().parents


def _code(error: Exception) -> int | None:
    """The number of an operating system's error, also where a library only tells of it."""
    if getattr(error, "errno", None) is not None:
        return error.errno
    if re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy
        return errno.ENOSPC
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    return int(told[1]) if told else None


def _free(place: Path) -> str:
    above = nearest_folder(place)
    return f"{bytes_text(shutil.disk_usage(above).free)} free in '{above}'"


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest of the folders that it is in, of those that there are."""
    return next(place for place in (path, *path.absolute().parents) if _exists(place))


def _exists(path: Path) -> bool:
    with suppress(OSError):  # a name that is too long, a folder that may not be looked into
        return path.exists()
    return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; no name is too odd to ask."""
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False


def check_place(path: Path, *, wanted: int = 0) -> None:
    """Refuse a file or folder that cannot be written at ``path``, before it is computed: try it.

    Raises
    ------
    MoeeError
        A file in the way; a folder that cannot be written to, or with less than ``wanted`` bytes
        of room.
    """
    with writing(path, wanted=wanted):
        path = resolved(path)
        if not path.name or not _is_text(path):
            raise MoeeError("a place with a name in UTF-8", repr(str(path)), ANOTHER_PLACE)
        path.with_name(f".{path.name}-unfinished").exists()  # a name may be too long
        above = nearest_folder(path.parent)
        if not above.is_dir():
            raise MoeeError(f"a place to write '{path}'", f"'{above}', a file", ANOTHER_PLACE)
        with tempfile.TemporaryFile(prefix=OURS, dir=above) as file:
            file.write(bytes(TRIAL))
        if shutil.disk_usage(above).free < wanted:
            raise OSError(errno.ENOSPC, "No space left")


def _is_text(path: Path) -> bool:
    """Whether a path is one that also libraries which want UTF-8 can open."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def resolved(path: Path) -> Path:
    """The whole path, links followed.

    Raises
    ------
    MoeeError
        Links in a circle, or a byte of zeros in it.
    """
    try:
        return path.resolve()
    except (RuntimeError, ValueError) as error:  # links in a circle, a byte of zeros
        raise MoeeError(f"a place to write '{path}'", str(error), ANOTHER_PLACE) from None


def bytes_text(count: float) -> str:
    """A size as a person says it: 3.1 MB, 20 GB."""
    for unit, size in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(content: Any) -> str:
    """SHA-256 of plain JSON values, in hex; the order of keys does not count."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
