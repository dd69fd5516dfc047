"""Errors of a disk in one line: the place, its free room and the room it would take."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from moee_analysis.errors import MoeeError
from moee_analysis.utils.environment import nearest_folder
from moee_analysis.utils.storage.locks import OURS, RANDOM

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
           errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EIO)  # fmt: skip
TRIAL = 1 << 16  # bytes
ANOTHER_PLACE = "choose a place that can be written to"


@contextmanager
def writing(
    place: Path, *, wanted: int = 0, hint: str = "", new: Path | None = None
) -> Iterator[None]:
    """While open, a disk's refusal to write ``place`` becomes a ``MoeeError`` in one line.

    It names the size: ``wanted`` bytes (0: nobody knows), or that of the temporary folder ``new``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        size = bytes_text(wanted) if wanted else ""
        size = f"more than {bytes_text(size_of(new))}" if new else size
        raise refusal(error, place, wanted=size, hint=hint) or error from None


def refusal(error: Exception, place: Path, *, wanted: str = "", hint: str = "") -> MoeeError | None:
    """What to say of a disk's ``error`` in writing ``place``, if it is one; ``wanted`` in words."""
    # something in a temporary file or folder is called by the path that it will have
    place = Path(re.sub(rf"(?<=/)\.([^/]+){OURS}{RANDOM}(?=/|$)", r"\1", str(place)))
    code = _code(error)
    if code in FULL:
        room, above = f"{wanted} of room" if wanted else "room", nearest_folder(place)
        free = f"{bytes_text(shutil.disk_usage(above).free)} free in '{above}'"
        hint = hint or "make room there, or choose another place"
        return MoeeError(f"{room} for '{place}'", f"{free} ({os.strerror(code)})", hint)
    if code in REFUSED and _concerns(error, place):
        return MoeeError(f"a place to write '{place}'", str(error), hint or ANOTHER_PLACE)
    return None


def _concerns(error: Exception, place: Path) -> bool:
    """Whether an error is about a place, as far as it says so, or the folders that it is in."""
    named = getattr(error, "filename", None)
    if named is None or error.errno == errno.ENAMETOOLONG or OURS in str(named):
        return True
    named, place = Path(named).absolute(), place.absolute()
    return named.is_relative_to(place) or named in place.parents


def _code(error: Exception) -> int | None:
    """The number of an operating system's error, also where a library only gives its text."""
    if getattr(error, "errno", None) is not None:
        return error.errno
    if re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy
        return errno.ENOSPC
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    return int(number[1]) if number else None


def check_place(path: Path, *, wanted: int = 0) -> None:
    """Refuse a ``path`` that cannot be written, or has less than ``wanted`` bytes of room."""
    with writing(path, wanted=wanted):
        try:
            path = path.resolve()
        except (RuntimeError, ValueError) as error:  # links in a circle, a byte of zeros
            raise MoeeError(f"a place to write '{path}'", str(error), ANOTHER_PLACE) from None
        if not path.name or re.search("[\ud800-\udfff]", str(path)):  # some libraries want UTF-8
            raise MoeeError("a place with a name in UTF-8", repr(str(path)), ANOTHER_PLACE)
        path.with_name(f".{path.name}-unfinished").exists()  # a name may be too long
        above = nearest_folder(path.parent)
        if not above.is_dir():
            raise MoeeError(f"a place to write '{path}'", f"'{above}', a file", ANOTHER_PLACE)
        with tempfile.TemporaryFile(prefix=OURS, dir=above) as file:
            file.write(bytes(TRIAL))
        if shutil.disk_usage(above).free < wanted:
            raise OSError(errno.ENOSPC, "No space left")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; some of them may vanish meanwhile."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(above) / name).lstat().st_size
    return total


def bytes_text(count: float) -> str:
    """A size as a person says it: 3.1 MB, 20 GB."""
    for unit, size in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
