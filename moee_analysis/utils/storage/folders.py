"""Temporary folders: they become what they are named for, or vanish, also after a kill.

What a killed process has left goes when the next folder of its kind is made.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import ended_in_order, undisturbed
from moee_analysis.utils.storage.files import DISK_ERRORS, bytes_text, flush, refusal, writing
from moee_analysis.utils.storage.locks import (
    RANDOM,
    is_held,
    locked,
    made_and_held,
    remove_left,
    temporary_prefix,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    with temporary_folder(final.parent, temporary_prefix(final.name), hint=hint) as partial:
        try:
            yield partial
            flush_all(partial)
        except DISK_ERRORS as error:
            size = f"more than {bytes_text(size_of(partial))}"
            raise refusal(error, final, wanted=size, hint=hint) or error from None
        _open_to_others(partial)
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
def held_folder(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there, and hold it alone; wait for another process to end.

    Raises
    ------
    MoeeError
        It cannot be made.
    """
    while True:
        with ExitStack() as held:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(folder))
            except FileNotFoundError:  # another process has renamed or removed it meanwhile
                continue
            yield
            return


@contextmanager
def temporary_folder(parent: Path, prefix: str, *, hint: str = "") -> Iterator[Path]:
    """Give a new folder in ``parent`` that is gone when this is closed.

    Those that killed processes have left with the same ``prefix`` go too.
    """
    remove_left(parent, re.escape(prefix) + RANDOM)
    with ExitStack() as stack:
        with writing(parent / prefix.strip(".-"), hint=hint), undisturbed():
            folder, lock = made_and_held(lambda: _empty_folder(parent / (prefix + uuid4().hex)))
            stack.callback(_remove, folder, lock)
        yield folder


def _remove(folder: Path, lock: int) -> None:
    with undisturbed():
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _empty_folder(path: Path) -> Path:
    path.mkdir(0o700)
    return path


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


def _open_to_others(folder: Path) -> None:
    """Let others read what their user may read; some libraries give a file to its owner alone."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)


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
    pattern = re.escape(temporary_prefix(final.name)) + RANDOM + OLD
    for old in [path for path in final.parent.iterdir() if re.fullmatch(pattern, path.name)]:
        if is_held(Path(str(old).removesuffix(OLD))):
            continue
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _publish(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``, unless another process was first with the same content."""
    try:
        new.rename(final)
    except OSError:
        if not final.is_dir():
            raise
