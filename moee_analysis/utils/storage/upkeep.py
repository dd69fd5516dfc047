"""Contents of a store, by run and by size, and removing the folders not used for longest."""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from moee_analysis.utils.storage.checksums import SEAL, read_seal
from moee_analysis.utils.storage.folders import make_folder
from moee_analysis.utils.storage.locks import is_held, locked, temporary, temporary_prefix
from moee_analysis.utils.storage.refusals import size_of, writing
from moee_analysis.utils.storage.store import ASIDE, UNFINISHED

KEY = "[0-9a-f]{20}"
KINDS = {  # of folders with checksums, in words
    "activations": "recorded tokens", "attention": "modes of attention", "clusters": "clusters",
    "costs": "costs of neurons", "finetuned": "fine-tuned runs", "measured": "measured",
    "merges": "merging schedules", "prices": "prices in time", "profile": "profiles",
    "reduced": "reduced tokens", "run": "runs", "seconds": "times",
    "statistics": "statistics of experts", "trained": "trainings",
}  # fmt: skip
OTHER_KINDS = {"sums": "sums, unfinished", "unfinished": "begun and not finished",
               "damaged": "damaged, set aside"}  # fmt: skip
# Names of the folders of a store: those with checksums, and the others
SEALED = rf"({'|'.join(KINDS)})-{KEY}"
OTHERS = rf"sums-{KEY}-{KEY}|\.{SEALED}{UNFINISHED}|{ASIDE}{SEALED}({UNFINISHED})?"


@dataclass(frozen=True)
class Entry:
    """A folder of a store: its ``size`` in bytes, and when it was ``used`` last, in seconds.

    ``kind`` is the first word of its name, "damaged" or "unfinished". A run has a ``title``.
    """

    path: Path
    kind: str
    size: int
    used: float
    title: str = ""
    uses: tuple[str, ...] = ()  # names of the folders that a run was made of


def entries(root: Path) -> list[Entry]:
    """All folders of the store ``root``, and nothing else there, the one used last at the end."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):  # removed meanwhile
            sealed = re.fullmatch(SEALED, path.name) and (path / SEAL).is_file()
            ours = sealed or re.fullmatch(OTHERS, path.name)
            if ours and path.is_dir() and not path.is_symlink():
                found.append(_entry(path))
    return sorted(found, key=lambda entry: entry.used)


def _entry(path: Path) -> Entry:
    kind = path.name.partition("-")[0]
    kind = UNFINISHED.strip("-") if kind.startswith(".") else kind
    about = read_seal(path).get("about", {})
    title, uses = str(about.get("run", "")), tuple(map(str, about.get("uses", ())))
    return Entry(path, kind, size_of(path), path.stat().st_mtime, title, uses)


def shares(found: Iterable[Entry]) -> tuple[list[tuple[Entry, int, int]], list[Entry]]:
    """The runs, the one used last first, and the folders that are of none.

    With a run stand the bytes that it has alone, and those of folders that others use too.
    """
    by_name = {entry.path.name: entry for entry in found}
    runs = {name: entry for name, entry in by_name.items() if entry.title}
    users = Counter(name for run in runs.values() for name in run.uses)
    table = []
    for run in reversed(runs.values()):
        parts = [by_name[name] for name in run.uses if name in by_name and name not in runs]
        alone = sum(part.size for part in parts if users[part.path.name] == 1)
        table.append((run, run.size + alone, sum(part.size for part in parts) - alone))
    rest = [entry for name, entry in by_name.items() if name not in runs and name not in users]
    return table, rest


def prune(root: Path, most: float) -> tuple[list[Entry], int, int]:
    """Remove folders that are not in use until a store holds at most ``most`` bytes.

    Damaged ones go first, then those that were not used for longest. Returns the folders removed,
    the bytes left, and of these those that could not be removed because they are in use.
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
    return removed, left, in_use


def _remove(path: Path) -> bool:
    """Remove a folder, in one step for all who see it, unless it is in use."""
    if is_held(path):
        return False
    prefix = temporary_prefix(path.with_name("removed"))
    with ExitStack() as unused:
        try:
            unused.enter_context(locked(path / SEAL, wait=False))
        except OSError:
            if (path / SEAL).exists():  # else a folder without checksums, which is of no use
                return False
        with writing(path), temporary(prefix, make_folder) as gone, suppress(FileNotFoundError):
            path.rename(gone / path.name)
    return True
