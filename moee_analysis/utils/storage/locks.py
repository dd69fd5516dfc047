"""Temporary files and folders, each held by a lock that ends with the process that fills it.

One that nobody holds was left by a process that was killed, and goes with the next of its name.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

OURS = "-moee-"  # in all temporary names: with RANDOM behind it no name of others is like it
RANDOM = "[0-9a-f]{32}"
READ = os.O_RDONLY | os.O_NONBLOCK  # nobody waits for a named pipe
LONGEST = 150  # bytes of a name in a temporary one, so that it is none that is too long


def temporary_prefix(path: Path) -> Path:
    """Beginning of the temporary paths of a file or folder that will be at ``path``."""
    name = path.name.encode(errors="ignore")[:LONGEST].decode(errors="ignore")
    return path.with_name(f".{name}{OURS}")


@contextmanager
def temporary(prefix: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Give a new path that begins with ``prefix``, as ``make`` makes it, gone when this closes."""
    remove_left(prefix.parent, re.escape(prefix.name) + RANDOM)
    path = prefix.with_name(prefix.name + uuid4().hex)
    with ExitStack() as stack:
        stack.callback(remove, path)  # also where a signal cuts short what follows
        stack.enter_context(held(path, make))
        stack.callback(remove, path)
        yield path


@contextmanager
def held(path: Path, make: Callable[[Path], object]) -> Iterator[None]:
    """Let ``make`` make a file or folder, and hold it alone; wait for another process to end."""
    with ExitStack() as stack:
        while True:
            make(path)
            # until it is locked, another process may rename it, or take it for one that was left
            with suppress(FileNotFoundError):
                stack.enter_context(locked(path))
                break
        yield


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file or folder as its only process, as long as this is open.

    An OSError: it is not there, or no longer; without ``wait`` also: held, or no locks are known.
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


def remove_left(parent: Path, names: str) -> None:
    """Remove everything in ``parent`` under ``names`` (a regular expression) that nobody holds."""
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
