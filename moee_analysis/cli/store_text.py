"""What ``moee store`` prints: what a store holds, and what was removed of it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING

from moee_analysis.outside_text import printable
from moee_analysis.utils.storage.files import bytes_text, nearest_folder
from moee_analysis.utils.storage.upkeep import shares

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from moee_analysis.utils.storage.upkeep import Entry, Pruned, Share

CALLED = {
    "activations": "recorded tokens", "clusters": "clusters", "reduced": "reduced tokens",
    "statistics": "statistics of experts", "costs": "costs of neurons", "sums": "sums, unfinished",
    "attention": "modes of attention", "finetuned": "fine-tuned runs", "trained": "trainings",
    "seconds": "times", "profile": "profiles", "unfinished": "begun and not finished",
    "damaged": "damaged, set aside", "run": "runs",
}  # fmt: skip
"""What the kinds of folders are called."""


def store_text(root: Path, found: Sequence[Entry]) -> str:
    """Say what a store holds: by run, the one used last first, and by kind for the rest."""
    free = shutil.disk_usage(nearest_folder(root)).free
    total = bytes_text(sum(entry.size for entry in found))
    runs, rest = shares(found)
    lines = [f"{root}: {total} in {len(found)} folders; {bytes_text(free)} free on that disk"]
    if runs:
        lines.append("     alone  with others  last used         run")
    lines += map(_run_text, runs)
    if rest:
        lines.append("of no run that is listed here")
    return "\n".join(map(printable, [*lines, *_kinds(rest)]))  # a run stays one line


def pruned_text(pruned: Pruned, most: float) -> str:
    """Say what was removed, and what could not be."""
    gone = bytes_text(sum(entry.size for entry in pruned.removed))
    line = f"removed {len(pruned.removed)} folders, {gone}; {bytes_text(pruned.left)} are left"
    if pruned.left > most:
        line += f", of which {bytes_text(pruned.in_use)} are in use by processes that run"
    return line


def _run_text(share: Share) -> str:
    used = datetime.fromtimestamp(share.run.used).strftime("%Y-%m-%d %H:%M")
    sizes = f"{bytes_text(share.alone):>10}  {bytes_text(share.shared):>11}"
    return f"{sizes}  {used}  {share.run.title}"


def _kinds(rest: Iterable[Entry]) -> list[str]:
    """A line for every kind of folder, the largest first."""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for entry in rest:
        kinds[entry.kind].append(entry.size)
    ordered = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
    return [
        f"{bytes_text(sum(sizes)):>10}  {CALLED.get(kind, kind)} (folders: {len(sizes)})"
        for kind, sizes in ordered
    ]
