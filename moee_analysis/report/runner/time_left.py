"""How far a report is: the cells that have ended, and how long the others take still.

The seconds that cells are expected to take, of an earlier report or noted in the notebook, are
scaled by those that the cells before them took: by their median, because the first notebook makes
what all others find in the store.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.std import tqdm

from moee_analysis.report.notebook.results import NOTEBOOK, read
from moee_analysis.utils.progress import has_bars, tell_progress

FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
SEEN = 0.01  # share of the expected seconds that has passed before a word about the rest
AROUND = 6.0  # seconds that a kernel takes to start and to end, and a page to be written
UNKNOWN = float("inf")
LOG_SECONDS = 20.0  # between the lines of a log


@dataclass
class Course:
    """How far one notebook is: cells that have ``ended`` of all, the last one ``at`` that moment.

    ``seconds`` are expected of each cell; empty where nobody knows. Time is taken from the end of
    the first cell on, for kernels take their time to start. ``paces`` are of the cells since: how
    many times as long they took, and the seconds that were expected.
    """

    cells: int
    seconds: list[float]
    ended: int = 0
    at: float = 0.0
    paces: list[tuple[float, float]] = field(default_factory=list)

    @property
    def expected(self) -> float:
        """Seconds expected of the whole notebook."""
        return sum(self.seconds) if self.seconds or self.ended == self.cells else UNKNOWN

    @property
    def next(self) -> float:
        """Seconds expected of the cell that runs, if one does."""
        return self.seconds[self.ended] if self.at and self.ended < self.cells else 0.0

    def see(self, ended: int) -> None:
        """Note how many cells have ended."""
        if ended > self.ended:
            now, expected = time.monotonic(), sum(self.seconds[self.ended : ended])
            if self.at and expected:
                self.paces.append(((now - self.at) / expected, expected))
            self.ended, self.at = min(ended, self.cells), now

    def end(self) -> None:
        """Note that the notebook has ended, at its last cell or before."""
        self.seconds, self.cells = self.seconds[: self.ended], self.ended


def seconds_left(courses: Mapping[str, Course], jobs: int) -> float | None:
    """Seconds that notebooks, in the order given, take still, ``jobs`` at a time; None: unknown."""
    now, every = time.monotonic(), courses.values()
    whole = sum(course.expected for course in every)
    paces = [pace for course in every for pace in course.paces]
    if whole == UNKNOWN or sum(expected for _, expected in paces) <= SEEN * whole:
        return None
    pace = _median(paces)
    # a cell that takes longer than its like tells something already
    slow = [course for course in every if course.next and now - course.at > course.next * pace]
    pace = max(_median([*paces, *(((now - c.at) / c.next, c.next) for c in slow)]), 1e-9)
    begun, later = [], []
    for course in every:
        rest = sum(course.seconds[course.ended :]) - min((now - course.at) / pace, course.next)
        (begun if course.at else later).append(pace * rest)
    free = sorted([*begun, *[0.0] * jobs], reverse=True)[:jobs]  # when each place is free
    for rest in later:
        free.sort()
        free[0] += AROUND + rest
    return max(free)


def _median(paces: list[tuple[float, float]]) -> float:
    """The pace in the middle of the seconds that were expected."""
    values, expected = zip(*paces, strict=True)
    return float(np.quantile(values, 0.5, weights=expected, method="inverted_cdf"))


def course_of(notebook: Path, earlier: Path) -> Course:
    """The course of a notebook of which there may be an ``earlier`` run in that folder."""
    cells = code_cells(notebook)
    count = 1 + len(cells)  # papermill adds one with the parameters
    ran = code_cells(earlier / NOTEBOOK)
    took = [cell["metadata"].get("papermill", {}).get("duration") for cell in ran]
    if len(took) == count and None not in took:
        return Course(count, took)
    noted = [cell["metadata"].get("moee", {}).get("seconds", 0.0) for cell in cells]
    return Course(count, [0.0, *noted] if any(noted) else [])


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook that run, if it is there."""
    return list(filter(runs, read(notebook).get("cells", [])))


def runs(cell: Mapping[str, Any]) -> bool:
    """Whether a cell is code that runs."""
    return cell["cell_type"] == "code" and bool("".join(cell["source"]).strip())


def in_order(courses: Mapping[Path, Course]) -> list[Path]:
    """Notebooks in the order in which several at a time are done soonest: the longest first.

    Before them comes the shortest, which makes what all others then find in the store.
    """
    first, *rest = sorted(courses, key=lambda path: (courses[path].expected, path.stem))
    return [first, *reversed(rest)]


@contextmanager
def watched(courses: Mapping[str, Course], jobs: int) -> Iterator[Callable[[str, int], None]]:
    """Give a function that notes how many cells of a notebook, by name, have ended.

    A bar over the cells of all notebooks shows it where a person watches a terminal; a plain log
    gets a line now and then.
    """
    look = {"bar_format": FORMAT, "leave": False, "dynamic_ncols": True}
    total, told = sum(course.cells for course in courses.values()), time.monotonic()
    with tqdm(total=total, disable=not has_bars(), **look) as bar:

        def see(name: str, ended: int) -> None:
            nonlocal told
            courses[name].see(ended)
            bar.total = sum(course.cells for course in courses.values())
            bar.n = sum(course.ended for course in courses.values())
            left = in_words(courses, jobs)
            bar.set_postfix_str(left, refresh=False)
            at = {n: c for n, c in courses.items() if 0 < c.ended < c.cells}
            words = [f"{n} {course.ended + 1}/{course.cells}" for n, course in at.items()]
            words = words or [f"{name} {'ends' if ended else 'starts'}"]
            bar.set_description_str(", ".join(words))
            if bar.disable and time.monotonic() - told > LOG_SECONDS:
                tell_progress(", ".join(filter(None, [*words, left])))
                told = time.monotonic()

        yield see


def in_words(courses: Mapping[str, Course], jobs: int) -> str:
    """How long it takes still; nothing where nobody knows."""
    left = seconds_left(courses, jobs)
    return "" if left is None else f"about {tqdm.format_interval(left)} left"
