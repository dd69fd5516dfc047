"""The content-keyed store: folders that are complete or absent, found again by their key.

A folder that differs from its checksums is named, set aside, and made again. A process holds a
lock, which others may share, on the checksums of those that it used last: none is removed then.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.checksums import SEAL, damage_of, seal
from moee_analysis.utils.storage.files import flush
from moee_analysis.utils.storage.folders import complete, held_folder
from moee_analysis.utils.storage.locks import OURS, RANDOM, READ, remove, remove_left
from moee_analysis.utils.storage.refusals import check_place, writing

FORMAT = 6  # part of every key: raise it whenever a step of the extraction changes its results
ELSEWHERE = "make room, or name another folder: --store DIR, or MOEE_STORE; TMPDIR without a store"
ASIDE = "damaged-"
UNFINISHED, BUILDING = "-unfinished", f"{OURS}building"
MOST_HELD = 300  # open files

_COLLECTIONS: ContextVar[tuple[list[str], ...]] = ContextVar("collections", default=())
_HELD: dict[Path, int] = {}
_TIDIED: set[Path] = set()

Build = Callable[[Path], None]


def content_key(**facts: Any) -> str:
    """Short key of everything that decides a result; ``facts`` must be plain JSON values."""
    text = json.dumps({"store_format": FORMAT, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def get_or_build(
    root: Path, name: str, build: Build, about: Mapping[str, Any] | None = None
) -> Path:
    """Return the folder ``root/name``, letting ``build(folder)`` fill it first if it is absent.

    A failure leaves nothing behind, and one process builds at a time. ``about`` are facts to list.
    """
    return _get(root / name, root / f".{name}{BUILDING}", build, about)


def get_or_resume(root: Path, name: str, build: Build) -> Path:
    """Return the folder ``root/name``, letting ``build(folder)`` fill or finish it if it is absent.

    ``build`` must see for itself which files of a killed process are whole; after a ``MoeeError``
    none is left.
    """
    return _get(root / name, unfinished_folder(root / name), build)


def unfinished_folder(final: Path) -> Path:
    """Where :func:`get_or_resume` fills the folder ``final``, until it is complete."""
    return final.with_name(f".{final.name}{UNFINISHED}")


def _get(final: Path, begun: Path, build: Build, about: Mapping[str, Any] | None = None) -> Path:
    with writing(final, hint=ELSEWHERE):
        final.parent.mkdir(parents=True, exist_ok=True)
    if not present(final):
        with held_folder(begun):
            if present(final):  # made by the process that was waited for
                remove(begun)
            else:
                _finish(begun, final, build, about)
        if not present(final):
            hint = "look after that disk, or name another folder for the store: --store DIR"
            raise MoeeError(f"'{final}' as it was just written", "another content", hint)
    return final


def _finish(begun: Path, final: Path, build: Build, about: Mapping[str, Any] | None) -> None:
    is_resumed = begun == unfinished_folder(final)
    for path in begun.iterdir():  # left by a kill
        if not is_resumed or path.name.startswith(".") or not path.is_file():
            remove(path)
    try:
        with writing(final, hint=ELSEWHERE, new=begun):
            build(begun)
            seal(begun, final.name, about)
            complete(begun)
            begun.rename(final)
            flush(final.parent)
    except BaseException as error:
        if not is_resumed or isinstance(error, MoeeError):  # which would be raised again
            remove(begun)
        raise


def present(folder: Path) -> bool:
    """Whether a folder of a store is there, as it was written; a damaged one is set aside."""
    use(folder)
    try:
        seen = folder.lstat()
    except (OSError, ValueError):  # also a name that is too odd
        return False
    if damage := damage_of(folder):
        set_aside(folder, damage, seen=seen)
        return False
    with suppress(OSError):
        os.utime(folder)  # used just now
    return True


def set_aside(folder: Path, damage: str, *, seen: os.stat_result) -> None:
    """Rename a damaged folder, so that it is made again, unless it is not what was ``seen``."""
    aside = folder.with_name(ASIDE + folder.name.lstrip("."))
    tell(f"'{folder}' is damaged ({damage}): set aside as '{aside.name}', and made again")
    with writing(folder, hint=ELSEWHERE), suppress(FileNotFoundError):
        if os.path.samestat(seen, folder.lstat()):
            remove(aside)
            folder.rename(aside)


def check_writable(root: Path) -> None:
    """Refuse a store that cannot be made or written to, before anything is computed for it."""
    try:
        check_place(root / "trial")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
    except MoeeError as error:
        expected = f"a store that can be written to at '{root}'"
        raise MoeeError(expected, error.found, ELSEWHERE) from None


def use(folder: Path) -> None:
    """Keep a folder of a store from being removed until this process ends, or has used many others.

    At the first use of a store, what killed processes have left there goes.
    """
    for names in _COLLECTIONS.get():
        names.append(folder.name)
    if folder.parent not in _TIDIED:
        _TIDIED.add(folder.parent)
        remove_left(folder.parent, rf"\..+({OURS}{RANDOM}|{BUILDING})")
    if folder in _HELD:
        os.close(_HELD.pop(folder))
    with suppress(OSError, ValueError):
        _HELD[folder] = os.open(folder / SEAL, READ)
        fcntl.flock(_HELD[folder], fcntl.LOCK_SH)
    while len(_HELD) > MOST_HELD:
        os.close(_HELD.pop(next(iter(_HELD))))


@contextmanager
def collecting() -> Iterator[list[str]]:
    """While open, the names of all folders that are used gather in the yielded list."""
    names: list[str] = []
    before = _COLLECTIONS.set((*_COLLECTIONS.get(), names))
    try:
        yield names
    finally:
        _COLLECTIONS.reset(before)
