"""The report: notebooks run one by one through papermill, and the pages made of them."""

from __future__ import annotations

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
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.outside_text import printable
from moee_analysis.report.pages.index import INDEX, write_index
from moee_analysis.report.pages.page import LOG, PAGE, read_story, write_page
from moee_analysis.report.runner.cell_progress import CELLS, cell_bar, cells_noted
from moee_analysis.report.runner.check_parameters import OWN, check_parameters
from moee_analysis.report.runner.jupyter import open_lab, own_kernel
from moee_analysis.report.runner.worker import STATUS
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.paths import notebooks_folder
from moee_analysis.utils.signals import ended_in_order
from moee_analysis.utils.storage.files import check_place, write_json
from moee_analysis.utils.storage.folders import new_folder

__all__ = ["Outcome", "open_lab", "report"]

CELL_SECONDS = {"smoke": 600, "small": 3600, "full": 6 * 3600}
"""The longest a single cell may take, per preset."""

STOP_SECONDS = 15
LOOK_SECONDS = 0.5  # between looks at how far a notebook is
WORKER_ENVIRONMENT = {
    "MOEE_HEADLESS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads that spin take the cores of those that work
}


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended.

    ``status`` is ``"ok"``, ``"cell_error"``, ``"timeout"`` or ``"dead_kernel"``; ``cell`` is
    the number in square brackets of the cell that ended the run, if one did.
    """

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


def report(
    parameters: Mapping[str, Any] | None = None,
    *,
    out: str | Path = "reports",
    preset: str = "small",
    notebooks: Sequence[str | Path] | None = None,
    timeout: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run notebooks and make a report of them that needs no network and no server.

    Parameters
    ----------
    parameters
        Values for the notebooks' parameters cells, checked against every one of them.
    out
        Folder of the report: ``index.html`` and, per notebook, a folder with ``page.html``,
        ``notebook.ipynb``, ``results.json``, ``status.json``, ``tables/`` and ``figures/``.
        A folder appears when its notebook is done; until then an older one stays.
    preset
        ``"smoke"``, ``"small"`` or ``"full"``.
    notebooks
        Paths of notebooks; None runs all of the project's.
    timeout
        Seconds a single cell may take; None takes the preset's :data:`CELL_SECONDS`.
    say
        Told one line when a notebook starts and ends, and where the index is.

    Returns
    -------
    list of Outcome
        One per notebook, in order. A failing notebook does not stop the others.

    Raises
    ------
    MoeeError
        Before anything runs: unknown or ill-typed parameters, notebooks that cannot take
        them, an ``out`` that holds something else.
    """
    preset_named(preset)
    if timeout is not None:
        whole_number("timeout", timeout, least=1)
    chosen = _chosen(notebooks)
    given = _checked(parameters or {}, chosen)
    folder = _checked_folder(Path(out), chosen)
    seconds = timeout or CELL_SECONDS[preset]
    outcomes: list[Outcome] = []
    with ended_in_order(), cell_bar(chosen) as bar:
        for number, notebook in enumerate(chosen):
            place = f"[{number + 1}/{len(chosen)}] {notebook.stem}"
            _say(say, f"{place}: started")
            outcome = _run(
                notebook, folder, given | {"preset": preset}, seconds=seconds,
                seen=partial(bar.show, number),
            )  # fmt: skip
            outcomes.append(outcome)
            _say(say, f"{place}: {_ending(outcome)}")
            write_index(folder, [done.folder for done in outcomes])
    _say(say, f"report: {folder / INDEX}")
    return outcomes


def _say(say: Callable[[str], None], line: str) -> None:
    """Let ``say`` tell a line; a bar makes room for it."""
    with tqdm.external_write_mode():
        say(printable(line))


def _chosen(notebooks: Sequence[str | Path] | None) -> list[Path]:
    """Absolute paths of the notebooks to run, each under a name of its own."""
    listed = sorted(notebooks_folder().glob("*.ipynb")) if notebooks is None else notebooks
    chosen = [_absolute(path) for path in listed]
    if not chosen:
        raise MoeeError("at least one notebook", "none", "name the notebooks to run")
    twice = [stem for stem, count in Counter(path.stem for path in chosen).items() if count > 1]
    if twice:
        raise MoeeError("notebooks with different names", f"'{twice[0]}' twice", "rename one")
    return chosen


def _absolute(path: str | Path) -> Path:
    try:
        path = Path(path).resolve()
        str(path).encode()  # papermill and pages take names in UTF-8 alone
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise MoeeError(
            "the path of a notebook, in UTF-8",
            f"{str(path)!r} ({error})",
            "rename it or its folder",
        ) from None
    return path


def _checked(parameters: Mapping[str, Any], notebooks: Sequence[Path]) -> dict[str, Any]:
    for name in OWN:
        if name in parameters:
            raise MoeeError(
                f"'{name}' as an argument of the report", "a notebook parameter", "move it there"
            )
    for notebook in notebooks:
        check_parameters(notebook, parameters)
    return dict(parameters)


def _checked_folder(out: Path, notebooks: Sequence[Path]) -> Path:
    """``out``, if it can be written and nothing would be overwritten that is not a report."""
    check_place(out / INDEX)
    for stem in (notebook.stem for notebook in notebooks):
        folder = out / stem
        if folder.exists() and not (folder / STATUS).is_file():
            raise MoeeError(
                f"'{folder}' to be free or an earlier report",
                "something else",
                "choose another folder for the report",
            )
    return out


def _run(
    notebook: Path,
    out: Path,
    parameters: dict[str, Any],
    *,
    seconds: int,
    seen: Callable[[int], None],
) -> Outcome:
    """Run one notebook in a new folder, which takes its place under ``out`` when complete.

    ``seen`` is told again and again how many code cells have ended.
    """
    final = out / notebook.stem
    with new_folder(final) as folder:
        job = {
            "notebook": str(notebook),
            "folder": str(folder.resolve()),
            "parameters": parameters | {"out": str(folder.resolve())},
            "timeout": seconds,
            "cwd": str(Path.cwd()),
        }
        status = _work(job, folder, seen) | read_story(notebook)
        write_json(folder / STATUS, status)
        _tidy(folder, {folder.resolve(): final, notebook: notebook.name})
        write_page(folder, status)
    return Outcome(
        notebook=notebook.stem,
        status=status["status"],
        seconds=status["seconds"],
        folder=final,
        error=status.get("error", ""),
        cell=status.get("cell"),
    )


def _work(job: dict[str, Any], folder: Path, seen: Callable[[int], None]) -> dict[str, Any]:
    """Run the job in a process of its own and return the status it leaves."""
    started = time.monotonic()
    command = [sys.executable, "-m", "moee_analysis.report.runner.worker", json.dumps(job)]
    with (
        own_kernel(hermetic=True) as environment,
        (folder / LOG).open("w") as log,
        _process(command, log, environment | WORKER_ENVIRONMENT) as child,
    ):
        while True:
            seen(cells_noted(folder))
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(LOOK_SECONDS)
                break
    if not (folder / STATUS).is_file():
        ended = f"the process that ran the notebook ended with code {code}"
        passed = round(time.monotonic() - started, 1)
        write_json(folder / STATUS, {"status": "dead_kernel", "error": ended, "seconds": passed})
    return json.loads((folder / STATUS).read_text())


@contextmanager
def _process(
    command: Sequence[str], log: Any, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """A child process out of reach of the terminal's Ctrl-C, which is over when this one is."""
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,  # never written to: its end tells the child that this one has died
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        child.terminate()  # the worker then takes its kernel down
        try:
            child.wait(STOP_SECONDS)
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


def _ending(outcome: Outcome) -> str:
    where = f" in cell {outcome.cell}" if outcome.cell else ""
    why = "" if outcome.ok else f"{where}: {' '.join(outcome.error.split())}"
    return f"{outcome.status.replace('_', ' ')} after {outcome.seconds:.0f} s{why}"
