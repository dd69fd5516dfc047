"""How far a report is: code cells done, of its notebooks and in all, and the time left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.std import tqdm

from moee_analysis.utils.progress import has_bars

CELLS = ".cells"  # file in a notebook's folder with a byte for every code cell that has ended
FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


@contextmanager
def cell_bar(notebooks: Sequence[Path]) -> Iterator[Callable[[int, int], None]]:
    """Show a bar over the code cells of all notebooks, where a person watches a terminal.

    Gives a function of the number of a notebook, from 0, and of its cells that have ended.
    """
    if not has_bars():
        yield lambda number, done: None
        return
    counts = list(map(count_cells, notebooks))
    with tqdm(total=sum(counts), bar_format=FORMAT, leave=False, dynamic_ncols=True) as bar:

        def show(number: int, done: int) -> None:
            count = counts[number]
            bar.n = sum(counts[:number]) + min(done, count)
            place = f"notebook {number + 1} of {len(counts)}"
            bar.set_description_str(f"{place}, cell {min(done + 1, count)} of {count}")

        yield show


def count_cells(notebook: Path) -> int:
    """How many code cells run of a notebook; papermill adds one with the parameters."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return 1 + sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)


def cells_noted(folder: Path) -> int:
    """How many code cells have ended of the notebook that runs in ``folder``."""
    path = folder / CELLS
    return path.stat().st_size if path.is_file() else 0
