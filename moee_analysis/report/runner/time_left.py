"""How far a report is: the cells that have ended, by the seconds that each is expected to take.

These are of an earlier report, or noted in the notebook; where nothing is noted, all cells count
alike. What is left takes as long as all before it, second by expected second.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.std import tqdm

from moee_analysis.report.notebook.results import NOTEBOOK, read
from moee_analysis.utils.progress import has_bars, tell_progress

FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
USUAL = 1.0  # seconds of a cell of which nobody knows
SEEN = 0.01  # share of the expected seconds that has passed before a word about the rest
LOG_SECONDS = 20.0  # between the lines of a log


@dataclass
class Course:
    """How far one notebook is: the ``seconds`` expected of its cells, and how many have ended."""

    seconds: list[float]
    ended: int = 0

    def end(self) -> None:
        """Note that the notebook has ended, at its last cell or before."""
        self.seconds = self.seconds[: self.ended]


@dataclass
class Watch:
    """How far all notebooks of a report are, by name; where no ``bar`` is seen, a log is told."""

    courses: Mapping[str, Course]
    bar: tqdm
    begun: float
    told: float

    def left(self) -> str:
        """How long the rest takes still, in words; nothing where nobody knows yet."""
        done = sum(sum(course.seconds[: course.ended]) for course in self.courses.values())
        whole = sum(sum(course.seconds) for course in self.courses.values())
        if done <= SEEN * whole:
            return ""
        rest = (time.monotonic() - self.begun) * (whole - done) / done
        return f"about {tqdm.format_interval(rest)} left"

    def see(self, name: str, ended: int) -> None:
        """Note how many cells of a notebook have ended, and show it."""
        own, left = self.courses[name], self.left()
        own.ended = min(ended, len(own.seconds))
        self.bar.total = sum(len(course.seconds) for course in self.courses.values())
        self.bar.n = sum(course.ended for course in self.courses.values())
        at = {n: c for n, c in self.courses.items() if 0 < c.ended < len(c.seconds)}
        words = [f"{n} {course.ended + 1}/{len(course.seconds)}" for n, course in at.items()]
        words = words or [f"{name} {'ends' if ended else 'starts'}"]
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.set_description_str(", ".join(words))
        if self.bar.disable and time.monotonic() - self.told > LOG_SECONDS:
            tell_progress(", ".join(filter(None, [*words, left])))
            self.told = time.monotonic()


@contextmanager
def watching(courses: Mapping[str, Course]) -> Iterator[Watch]:
    """Watch the cells of all notebooks: in a bar on a terminal, now and then in a plain log."""
    now, look = time.monotonic(), {"bar_format": FORMAT, "leave": False, "dynamic_ncols": True}
    with tqdm(total=0, disable=not has_bars(), **look) as bar:
        yield Watch(courses, bar, begun=now, told=now)


def course_of(notebook: Path, earlier: Path) -> Course:
    """The course of a notebook of which there may be an ``earlier`` run in that folder."""
    cells, ran = code_cells(notebook), code_cells(earlier / NOTEBOOK)
    took = [cell["metadata"].get("papermill", {}).get("duration") for cell in ran]
    if len(took) == 1 + len(cells) and None not in took:  # papermill adds one, with the parameters
        return Course(took)
    noted = [cell["metadata"].get("moee", {}).get("seconds", 0.0) for cell in cells]
    return Course([0.0, *(noted if any(noted) else [USUAL] * len(noted))])


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
    first, *rest = sorted(courses, key=lambda path: (sum(courses[path].seconds), path.stem))
    return [first, *reversed(rest)]
