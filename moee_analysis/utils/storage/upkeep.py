"""What a store holds, by run and by size, and removing what was not used for longest."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moee_analysis.utils.storage.checksums import SEAL, about
from moee_analysis.utils.storage.folders import size_of, temporary_folder
from moee_analysis.utils.storage.in_use import unused
from moee_analysis.utils.storage.locks import is_held, temporary_prefix
from moee_analysis.utils.storage.store import ASIDE, UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

KEY = "[0-9a-f]{20}"
KINDS = (
    "activations", "attention", "clusters", "costs", "finetuned", "profile", "reduced", "run",
    "seconds", "statistics", "trained",
)  # fmt: skip
SEALED = rf"({'|'.join(KINDS)})-{KEY}"
OTHERS = rf"sums-{KEY}-{KEY}|\.{SEALED}{UNFINISHED}|{ASIDE}{SEALED}({UNFINISHED})?"
"""Names of the folders of a store: those with checksums, and the others."""


@dataclass(frozen=True)
class Entry:
    """A folder of a store: its ``size`` in bytes, and when it was ``used`` last, in seconds.

    ``kind`` is the first word of its name, "damaged" or "unfinished". A run has a ``title`` and the
    names of the folders it was made of.
    """

    path: Path
    kind: str
    size: int
    used: float
    title: str = ""
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """What a run takes of a store, in bytes: what it has alone, and what others use as well."""

    run: Entry
    alone: int
    shared: int


@dataclass(frozen=True)
class Pruned:
    """What was removed of a store, and how many bytes are left; some of them ``in_use``."""

    removed: tuple[Entry, ...]
    left: int
    in_use: int


def entries(root: Path) -> list[Entry]:
    """All folders of the store ``root``, those that were not used for longest first.

    Whatever else lies there, in a folder that was not made for a store alone, is left out.
    """
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):  # removed meanwhile
            if _is_of_store(path):
                found.append(_entry(path))
    return sorted(found, key=lambda entry: entry.used)


def _is_of_store(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    sealed = re.fullmatch(SEALED, path.name) and (path / SEAL).is_file()
    return bool(sealed or re.fullmatch(OTHERS, path.name))


def _entry(path: Path) -> Entry:
    told, used = about(path), path.stat().st_mtime
    title, uses = str(told.get("run", "")), tuple(map(str, told.get("uses", ())))
    return Entry(path, _kind(path.name), size_of(path), used, title, uses)


def _kind(name: str) -> str:
    if name.startswith(ASIDE):
        return ASIDE.strip("-")
    return UNFINISHED.strip("-") if name.startswith(".") else name.partition("-")[0]


def shares(found: Iterable[Entry]) -> tuple[list[Share], list[Entry]]:
    """What every run takes, the one used last first; and the folders that are of no run."""
    by_name = {entry.path.name: entry for entry in found}
    runs = [entry for entry in by_name.values() if entry.title]
    users = Counter(name for run in runs for name in run.uses)
    own = {run.path.name for run in runs}
    told = []
    for run in reversed(runs):
        parts = [by_name[name] for name in run.uses if name in by_name and name not in own]
        alone = sum(part.size for part in parts if users[part.path.name] == 1)
        told.append(Share(run, run.size + alone, sum(part.size for part in parts) - alone))
    rest = [entry for name, entry in by_name.items() if name not in own and name not in users]
    return told, rest


def prune(root: Path, most: float) -> Pruned:
    """Remove folders of a store until it holds ``most`` bytes at most; damaged ones go first.

    Then go those that were not used for longest. What a running process uses stays.
    """
    found = entries(root)
    left, in_use, removed = sum(entry.size for entry in found), 0, []
    for entry in sorted(found, key=lambda entry: entry.kind != ASIDE.strip("-")):
        if left <= most:
            break
        if _remove(entry.path):
            removed.append(entry)
            left -= entry.size
        else:
            in_use += entry.size
    return Pruned(tuple(removed), left, in_use)


def _remove(path: Path) -> bool:
    """Remove a folder, in one step for all who see it, unless it is in use."""
    if is_held(path):
        return False
    with unused(path) as free:
        if free:
            with (
                suppress(FileNotFoundError),
                temporary_folder(path.parent, temporary_prefix("removed")) as gone,
            ):
                path.rename(gone / path.name)
        return free
