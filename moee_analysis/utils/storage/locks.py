"""Files and folders that a process holds; what nobody holds was left by one that was killed.

Whoever fills a temporary file or folder holds a lock on it, which ends with the process.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RANDOM = "[0-9a-f]{32}"
"""What :func:`temporary_prefix` is followed by, as a regular expression."""

READ = os.O_RDONLY | os.O_NONBLOCK
"""How what is locked is opened: nobody waits for a named pipe."""

OURS = "-moee-"
"""In all temporary names. With :data:`RANDOM` behind it no name of anybody else's is like it."""

LONGEST = 150  # bytes of a name in a temporary one, so that this is none that is too long


def temporary_prefix(name: str) -> str:
    """What the temporary names begin with of what will have this ``name``."""
    return f".{name.encode(errors='ignore')[:LONGEST].decode(errors='ignore')}{OURS}"


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file or folder as its only process, as long as this is open.

    Raises
    ------
    OSError
        Nothing there, also after waiting; without ``wait`` also what another process holds, or a
        file system that has no locks.
    """
    handle = os.open(path, READ)
    try:
        with suppress(OSError) if wait else nullcontext():
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise FileNotFoundError(f"'{path}' was replaced meanwhile")
        yield
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether another process, or this one, holds a file or folder."""
    try:
        with locked(path, wait=False):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def made_and_held(make: Callable[[], Path]) -> tuple[Path, int]:
    """What ``make`` makes, and an open file that holds it until it is closed."""
    while True:
        path = make()
        handle = os.open(path, READ)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path, handle
        os.close(handle)  # it was taken for one that was left, between the two steps


def remove_left(parent: Path, names: str) -> None:
    """Remove what lies in ``parent`` under ``names`` (a regular expression) and nobody holds."""
    with suppress(OSError, ValueError):
        for path in [path for path in parent.iterdir() if re.fullmatch(names, path.name)]:
            with suppress(OSError), locked(path, wait=False):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
