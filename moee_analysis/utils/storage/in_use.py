"""Which folders of a store are in use, so that none is removed under a process's hands.

A process holds a lock, which others may share, on the checksums of the folders that it used last.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from moee_analysis.utils.storage.checksums import SEAL
from moee_analysis.utils.storage.locks import OURS, RANDOM, READ, locked, remove_left

MOST_HELD = 300  # open files

_COLLECTIONS: ContextVar[tuple[list[str], ...]] = ContextVar("collections", default=())
_HELD: dict[Path, int] = {}
_TIDIED: set[Path] = set()


def use(folder: Path) -> None:
    """Keep a folder of a store from being removed until this process ends, or has used many others.

    Temporary files of killed processes go from a store when a process first uses it.
    """
    for names in _COLLECTIONS.get():
        names.append(folder.name)
    if folder.parent not in _TIDIED:
        _TIDIED.add(folder.parent)
        remove_left(folder.parent, rf"\..+{OURS}{RANDOM}")
    if folder in _HELD:
        os.close(_HELD.pop(folder))
    with suppress(OSError, ValueError):
        _HELD[folder] = os.open(folder / SEAL, READ)
        fcntl.flock(_HELD[folder], fcntl.LOCK_SH)
    while len(_HELD) > MOST_HELD:
        os.close(_HELD.pop(next(iter(_HELD))))


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses a folder of a store; none begins to while this is open."""
    with ExitStack() as held:
        free = True
        try:
            held.enter_context(locked(folder / SEAL, wait=False))
        except OSError:  # a folder without checksums is of no use
            free = not (folder / SEAL).exists()
        yield free


@contextmanager
def collecting() -> Iterator[list[str]]:
    """While open, the names of all folders of a store that are used gather in the yielded list."""
    names: list[str] = []
    before = _COLLECTIONS.set((*_COLLECTIONS.get(), names))
    try:
        yield names
    finally:
        _COLLECTIONS.reset(before)
