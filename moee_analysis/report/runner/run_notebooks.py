"""The report: notebooks run one by one through papermill, and the pages made of them."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.std import tqdm

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.outside_text import printable
from moee_analysis.report.notebook.results import NOTEBOOK, STATUS
from moee_analysis.report.pages.site import INDEX, LOG, PAGE, read_story, write_index, write_page
from moee_analysis.report.runner.check_parameters import OWN, check_parameters
from moee_analysis.report.runner.jupyter import own_kernel
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.environment import own_folder
from moee_analysis.utils.progress import has_bars
from moee_analysis.utils.signals import PATIENCE, ended_in_order
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.folders import new_folder
from moee_analysis.utils.storage.refusals import check_place

CELLS = ".cells"  # file in a notebook's folder with a byte for every code cell that has ended
FORMAT = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
CELL_SECONDS = {"smoke": 600, "small": 3600, "full": 6 * 3600}
"""The longest a single cell may take, per preset."""

LOOK_SECONDS = 0.5  # between looks at how far a notebook is
Seen = Callable[[int], None]  # called again and again with the number of cells that have ended

WORKER_ENVIRONMENT = {
    "MOEE_HEADLESS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin take the cores of those that work
}


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended; see ``worker.run_notebook``."""

    notebook: str
    status: str
    seconds: float
    folder: Path
    error: str = ""
    cell: int | None = None

    @property
    def ok(self) -> bool:
        """Whether every cell ran."""
        return self.status == "ok"

    @property
    def page(self) -> Path:
        """The notebook's page."""
        return self.folder / PAGE

    def __str__(self) -> str:
        where = f" in cell {self.cell}" if self.cell else ""
        why = "" if self.ok else f"{where}: {' '.join(self.error.split())}"
        return f"{self.status.replace('_', ' ')} after {self.seconds:.0f} s{why}"


def report(
    parameters: Mapping[str, Any] | None = None, *, out: str | Path = "reports",
    preset: str = "small", notebooks: Sequence[str | Path] | None = None,
    timeout: int | None = None, say: Callable[[str], None] = print,
) -> list[Outcome]:  # fmt: skip
    """Run notebooks, by their paths or all of the project's, and make a report of them.

    It needs no network and no server: the folder ``out`` gets an ``index.html`` and, per notebook,
    a folder with ``page.html``, ``notebook.ipynb``, ``results.json``, ``status.json``, ``tables/``
    and ``figures/``, which appears when its notebook is done. A failing notebook does not stop the
    others. ``parameters`` are values for the notebooks' parameters cells; those that one cannot
    take are refused first. A single cell may take ``timeout`` seconds, None the preset's
    :data:`CELL_SECONDS`. ``say`` is told when a notebook starts and ends, and where the index is.
    """
    preset_named(preset)
    if timeout is not None:
        whole_number("timeout", timeout)
    chosen, folder, given = _choose(notebooks), Path(out), dict(parameters or {})
    _check(given, chosen, folder)
    given, seconds = given | {"preset": preset}, timeout or CELL_SECONDS[preset]
    outcomes: list[Outcome] = []
    with ended_in_order(), cell_bar(chosen) as show:
        for number, notebook in enumerate(chosen):
            place = f"[{number + 1}/{len(chosen)}] {notebook.stem}"
            _say(say, f"{place}: started")
            seen = partial(show, number)
            outcome = _run(notebook, folder / notebook.stem, given, seconds, seen)
            outcomes.append(outcome)
            _say(say, f"{place}: {outcome}")
            write_index(folder, [done.folder for done in outcomes])
    _say(say, f"report: {folder / INDEX}")
    return outcomes


def _say(say: Callable[[str], None], line: str) -> None:
    """Let ``say`` tell a line; a bar makes room for it."""
    with tqdm.external_write_mode():
        say(printable(line))


@contextmanager
def cell_bar(notebooks: Sequence[Path]) -> Iterator[Callable[[int, int], None]]:
    """Show a bar over the code cells of all notebooks, where a person watches a terminal.

    Gives a function of the number of a notebook, from 0, and of its cells that have ended.
    """
    if not has_bars():
        yield lambda number, done: None
        return
    counts = list(map(_count_cells, notebooks))
    with tqdm(total=sum(counts), bar_format=FORMAT, leave=False, dynamic_ncols=True) as bar:

        def show(number: int, done: int) -> None:
            count = counts[number]
            bar.n = sum(counts[:number]) + min(done, count)
            place = f"notebook {number + 1} of {len(counts)}"
            bar.set_description_str(f"{place}, cell {min(done + 1, count)} of {count}")

        yield show


def _count_cells(notebook: Path) -> int:
    """How many code cells run of a notebook; papermill adds one with the parameters."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return 1 + sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)


def count_ended_cells(folder: Path) -> int:
    """How many code cells have ended of the notebook that runs in ``folder``."""
    path = folder / CELLS
    return path.stat().st_size if path.is_file() else 0


def _choose(notebooks: Sequence[str | Path] | None) -> list[Path]:
    """Absolute paths of the notebooks to run, each under a name of its own."""
    chosen = []
    for path in own_folder("notebooks").glob("*.ipynb") if notebooks is None else notebooks:
        try:
            chosen.append(Path(path).resolve())
            str(chosen[-1]).encode()  # papermill and pages take names in UTF-8 alone
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            found, hint = f"{str(path)!r} ({error})", "rename it or its folder"
            raise MoeeError("the path of a notebook, in UTF-8", found, hint) from None
    if not chosen:
        raise MoeeError("at least one notebook", "none", "name the notebooks to run")
    twice = [stem for stem, count in Counter(path.stem for path in chosen).items() if count > 1]
    if twice:
        raise MoeeError("notebooks with different names", f"'{twice[0]}' twice", "rename one")
    return sorted(chosen) if notebooks is None else chosen


def _check(given: Mapping[str, Any], notebooks: Sequence[Path], out: Path) -> None:
    """Refuse parameters that do not fit, and a place where anything but a report would be lost."""
    for name in OWN:
        if name in given:
            expected = f"'{name}' as an argument of the report"
            raise MoeeError(expected, "a notebook parameter", "move it there")
    for notebook in notebooks:
        check_parameters(notebook, given)
    check_place(out / INDEX)
    for folder in (out / notebook.stem for notebook in notebooks):
        if folder.exists() and not (folder / STATUS).is_file():
            hint = "choose another folder for the report"
            raise MoeeError(f"'{folder}' to be free or an earlier report", "something else", hint)


def _run(
    notebook: Path, final: Path, parameters: dict[str, Any], seconds: int, seen: Seen
) -> Outcome:
    """Run one notebook in a new folder, which takes the place of ``final`` when complete."""
    with new_folder(final) as folder:
        place = folder.resolve()
        job = {
            "notebook": str(notebook),
            "written": str(place / NOTEBOOK),
            "status": str(place / STATUS),
            "cells": str(place / CELLS),
            "parameters": parameters | {"out": str(place)},
            "timeout": seconds,
            "cwd": str(Path.cwd()),
        }
        status = _work(job, folder, seen) | read_story(notebook)
        write_json(folder / STATUS, status)
        _tidy(folder, {place: final, notebook: notebook.name})
        write_page(folder, status)
    facts = {name: status[name] for name in ("error", "cell") if name in status}
    return Outcome(notebook.stem, status["status"], status["seconds"], final, **facts)


def _work(job: dict[str, Any], folder: Path, seen: Seen) -> dict[str, Any]:
    """Do the job in a process of its own and return the status it leaves."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "moee_analysis.report.runner.worker", json.dumps(job)]
    with (
        own_kernel(hermetic=True) as environment,
        (folder / LOG).open("w") as log,
        _process(command, env=environment | WORKER_ENVIRONMENT, stdout=log, stderr=log) as worker,
    ):
        while worker.poll() is None:
            seen(count_ended_cells(folder))
            with suppress(subprocess.TimeoutExpired):
                worker.wait(LOOK_SECONDS)
    if (folder / STATUS).is_file():
        return json.loads((folder / STATUS).read_text(encoding="utf-8"))
    error = f"the process that ran the notebook ended with code {worker.returncode}"
    seconds = round(time.monotonic() - begun, 1)
    return {"status": "dead_kernel", "error": error, "seconds": seconds}


@contextmanager
def _process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A child process out of reach of the terminal's Ctrl-C, which is over when this one is."""
    # nothing is ever written to its stdin: the end of it tells the child that this one has died
    pipe = {"stdin": subprocess.PIPE, "start_new_session": True}
    child = subprocess.Popen(command, **pipe, **options)
    try:
        yield child
    finally:
        child.terminate()  # the worker then takes its kernel down
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdin.close()


def _tidy(folder: Path, names: Mapping[Path, Path | str]) -> None:
    """Drop an empty log and notes; in the notebook, give this machine's places their ``names``."""
    (folder / CELLS).unlink(missing_ok=True)
    if not (folder / LOG).stat().st_size:
        (folder / LOG).unlink()
    for path in folder.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        for place, name in names.items():
            text = text.replace(json.dumps(str(place))[1:-1], json.dumps(str(name))[1:-1])
        path.write_text(text, encoding="utf-8")
