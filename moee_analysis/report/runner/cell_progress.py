"""How far a report is: code cells done, of its notebooks and in all, and the time left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.std import tqdm

from moee_analysis.utils.progress import has_bars

CELLS = ".cells"
"""File in a notebook's folder with a line for every code cell that has ended."""

FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


@dataclass(frozen=True)
class CellBar:
    """A bar over the code cells of all notebooks, of which each has so many ``counts``.

    The time left is what the remaining cells take if they are like those that are done, so it is
    rough: some cells take a hundred times as long as others. Without a ``bar`` nothing is shown.
    """

    counts: tuple[int, ...]
    bar: tqdm | None = None

    def show(self, number: int, done: int) -> None:
        """Say that ``done`` cells of notebook ``number``, from 0, have ended."""
        if self.bar is None:
            return
        count = self.counts[number]
        self.bar.n = sum(self.counts[:number]) + min(done, count)
        self.bar.set_description_str(
            f"notebook {number + 1} of {len(self.counts)}, cell {min(done + 1, count)} of {count}"
        )


@contextmanager
def cell_bar(notebooks: Sequence[Path]) -> Iterator[CellBar]:
    """A bar for a report of these notebooks, where a person watches a terminal."""
    counts = tuple(map(code_cells, notebooks))
    if not has_bars():
        yield CellBar(counts)
        return
    with tqdm(total=sum(counts), bar_format=FORMAT, leave=False, dynamic_ncols=True) as bar:
        yield CellBar(counts, bar)


def code_cells(notebook: Path) -> int:
    """How many code cells run of a notebook; papermill adds one with the parameters."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return 1 + sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)


def note_cell(folder: Path) -> None:
    """Note in the ``folder`` of a notebook that a code cell has ended."""
    with (folder / CELLS).open("a", encoding="utf-8") as file:
        file.write("done\n")


def cells_noted(folder: Path) -> int:
    """How many code cells have ended, as noted by :func:`note_cell`."""
    path = folder / CELLS
    return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0
