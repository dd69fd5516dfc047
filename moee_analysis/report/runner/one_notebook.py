"""One notebook of a report, run in a process of its own, and its page."""

import json
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee_analysis.report.notebook.results import NOTEBOOK, STATUS, read
from moee_analysis.report.pages.site import LOG, read_story, write_page
from moee_analysis.report.runner.jupyter import own_kernel
from moee_analysis.report.summary.gates import Gate
from moee_analysis.utils.signals import PATIENCE
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.folders import new_folder

CELLS = ".cells"  # file in a notebook's folder with a byte for every code cell that has ended
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

    def __str__(self) -> str:
        line = f"{self.status.replace('_', ' ')} after {self.seconds:.0f} s"
        where = f" in cell {self.cell}" if self.cell else ""
        return line if self.ok else f"{line}{where}: {' '.join(self.error.split())}"


Steps = Generator[int, None, Outcome]
"""A notebook that runs: yields how many of its cells have ended, whenever it is asked."""


@dataclass(frozen=True)
class Settings:
    """What the notebooks of a report have in common, and what is asked of it."""

    out: Path
    parameters: Mapping[str, Any]
    timeout: int
    threads: Mapping[str, str]  # environment variables, as ``run_notebooks.thread_limits`` has them
    gates: Sequence[Gate]
    against: Mapping[str, Any] | None  # the summary of an earlier report

    def run(self, notebook: Path) -> Steps:
        """Run a notebook in a new folder, which takes its place in ``out`` when complete."""
        final = self.out / notebook.stem
        with new_folder(final) as folder:
            place = folder.resolve()
            job = {
                "notebook": str(notebook),
                "written": str(place / NOTEBOOK),
                "status": str(place / STATUS),
                "cells": str(place / CELLS),
                "parameters": {**self.parameters, "out": str(place)},
                "timeout": self.timeout,
            }
            status = (yield from self._work(job, folder)) | read_story(notebook)
            write_json(folder / STATUS, status)
            _tidy(folder, {place: final, notebook: notebook.name})
            write_page(folder, status)
        facts = {name: status[name] for name in ("error", "cell") if name in status}
        return Outcome(notebook.stem, status["status"], status["seconds"], final, **facts)

    def _work(self, job: dict[str, Any], folder: Path) -> Generator[int, None, dict[str, Any]]:
        """Do the job in a process of its own and return the status it leaves."""
        begun = time.monotonic()
        command = [sys.executable, "-m", "moee_analysis.report.runner.worker", json.dumps(job)]
        with own_kernel(hermetic=True) as variables, (folder / LOG).open("w") as log:
            own = variables | WORKER_ENVIRONMENT | self.threads
            with _process(command, env=own, stdout=log, stderr=log) as worker:
                while worker.poll() is None:
                    yield count_ended_cells(folder)
        error = f"the process that ran the notebook ended with code {worker.returncode}"
        seconds = round(time.monotonic() - begun, 1)
        dead = {"status": "dead_kernel", "error": error, "seconds": seconds}
        return read(folder / STATUS) or dead


def count_ended_cells(folder: Path) -> int:
    """How many code cells have ended of the notebook that runs in ``folder``."""
    path = folder / CELLS
    return path.stat().st_size if path.is_file() else 0


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
