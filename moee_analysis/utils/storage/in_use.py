"""Which folders of a store are in use, so that none is removed under a process's hands.

A process holds a lock, which others may share, on the checksums of the folders that it used last.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING

from moee_analysis.utils.storage.checksums import SEAL
from moee_analysis.utils.storage.locks import OURS, RANDOM, READ, remove_left

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_HELD = 300  # open files
TEMPORARY = rf"\..+{OURS}{RANDOM}"
"""Names of files and folders in a store that are being filled."""

_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected", default=None)
_HELD: dict[Path, int] = {}
_TIDIED: set[Path] = set()


def use(folder: Path) -> None:
    """Keep a folder of a store from being removed until this process ends, or has used many others.

    What killed processes have left in a store goes when a process first uses it.
    """
    collected = _COLLECTED.get()
    if collected is not None:
        collected.append(folder.name)
    if folder.parent not in _TIDIED:
        _TIDIED.add(folder.parent)
        remove_left(folder.parent, TEMPORARY)
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
    try:
        handle = os.open(folder / SEAL, READ)
    except OSError:  # a folder without checksums is of no use
        yield True
        return
    try:
        yield _locks(handle)
    finally:
        os.close(handle)


def _locks(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def collecting() -> Iterator[list[str]]:
    """While open, the names of all folders of a store that are used gather in the yielded list."""
    found: list[str] = []
    outer = _COLLECTED.get()
    before = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(before)
        if outer is not None:
            outer.extend(found)
