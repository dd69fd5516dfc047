"""Temporary folders: they become what they are named for, or vanish, also after a kill.

Whoever fills a folder holds a lock on it, which ends with the process. A folder that nobody holds
was left by a process that was killed, and whoever makes the next one of its kind removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moee_analysis.endings import ended_in_order
from moee_analysis.errors import MoeeError
from moee_analysis.files import bytes_text, flush, refusal, writing

if TYPE_CHECKING:
    from collections.abc import Iterator

RANDOM = r"[a-z0-9_]{8}"
"""What :mod:`tempfile` puts behind a prefix."""
OLD = "-old"
OTHER_TEMPORARY = "make room there, or set TMPDIR to a folder on another disk"


@contextmanager
def new_folder(final: Path, *, replace: bool = True, hint: str = "") -> Iterator[Path]:
    """Give a temporary folder that becomes ``final`` on success and vanishes on failure.

    An older ``final`` stays untouched until the new one is complete and flushed to the disk, and
    for good without ``replace``. ``hint`` says what to do where no folder can be made.

    Raises
    ------
    MoeeError
        The folder cannot be made, or the disk is full.
    """
    final = Path(final).resolve()
    with writing(final, hint=hint):
        final.parent.mkdir(parents=True, exist_ok=True)
        _restore(final)
    with temporary_folder(final.parent, f".{final.name}-", hint=hint) as partial:
        try:
            yield partial
            flush_all(partial)
        except OSError as error:
            size = f"more than {bytes_text(size_of(partial))}"
            raise refusal(error, final, wanted=size, hint=hint) or error from None
        partial.chmod(0o755)
        if replace:
            _replace(partial, final)
        else:
            _publish(partial, final)
        flush(final.parent)


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Give a folder for what is needed for a while, which is gone when this is closed.

    SIGTERM closes it. A folder of this ``kind`` that a killed process has left goes too.

    Raises
    ------
    MoeeError
        There is no room for temporary files.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise MoeeError("a folder for temporary files", str(error), OTHER_TEMPORARY) from None
    with (
        ended_in_order(),
        temporary_folder(parent, f"moee-{kind}-", hint=OTHER_TEMPORARY) as folder,
        writing(folder, hint=OTHER_TEMPORARY),
    ):
        yield folder


@contextmanager
def temporary_folder(parent: Path, prefix: str, *, hint: str = "") -> Iterator[Path]:
    """Give a new folder in ``parent`` that is gone when this is closed.

    Those that killed processes have left with the same ``prefix`` go too.
    """
    remove_left(parent, re.escape(prefix) + RANDOM)
    with writing(parent / prefix.strip(".-"), hint=hint):
        folder, lock = _held(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left(parent: Path, names: str) -> None:
    """Remove the folders in ``parent`` that nobody holds, of ``names`` (a regular expression)."""
    with suppress(OSError):
        for folder in [path for path in parent.iterdir() if re.fullmatch(names, path.name)]:
            with suppress(OSError), locked(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the folder as its only process, as long as this is open.

    Raises
    ------
    OSError
        No such folder; without ``wait`` also one that another process holds, or a file system that
        has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if wait else nullcontext():
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), folder.stat()):
            raise FileNotFoundError(f"'{folder}' was replaced meanwhile")
        yield
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Bring all files of a folder, and the lists of their names, to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            flush(path)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; some of them may vanish meanwhile."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(above) / name).lstat().st_size
    return total


def _held(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the lock on it, which is there before another process can take it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # it was taken for one that was left, between the two steps


def _replace(new: Path, final: Path) -> None:
    """Put ``new`` in the place of ``final``; the old one is removed only afterwards."""
    old = Path(f"{new}{OLD}")
    with suppress(FileNotFoundError):
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        with suppress(FileNotFoundError):
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(final: Path) -> None:
    """Finish an exchange of folders that a kill has cut short: the old one is there, or gone."""
    pattern = re.escape(f".{final.name}-") + RANDOM + OLD
    for old in [path for path in final.parent.iterdir() if re.fullmatch(pattern, path.name)]:
        if _is_held(Path(str(old).removesuffix(OLD))):
            continue
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _is_held(folder: Path) -> bool:
    try:
        with locked(folder, wait=False):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def _publish(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``, unless another process was first with the same content."""
    try:
        new.rename(final)
    except OSError:
        if not final.is_dir():
            raise
