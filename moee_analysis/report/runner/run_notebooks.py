"""The report: notebooks run side by side through papermill, and the pages made of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from tqdm.std import tqdm

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.outside_text import printable
from moee_analysis.report.notebook.results import STATUS
from moee_analysis.report.pages.site import INDEX
from moee_analysis.report.runner.check_parameters import OWN, check_parameters
from moee_analysis.report.runner.choose import check_paths
from moee_analysis.report.runner.one_notebook import Outcome, Settings
from moee_analysis.report.runner.publish import Publisher, summary_lines
from moee_analysis.report.runner.side_by_side import run_side_by_side, thread_limits, usual_jobs
from moee_analysis.report.runner.time_left import (
    course_of,
    in_order,
    seconds_left,
    time_text,
    watched,
)
from moee_analysis.report.summary.gates import Gate, check_gates
from moee_analysis.report.summary.summary import read_summary
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.signals import ended_in_order
from moee_analysis.utils.storage.locks import locked
from moee_analysis.utils.storage.refusals import check_place, writing

CELL_SECONDS = {"smoke": 600, "small": 3600, "full": 6 * 3600}
"""The longest a single cell may take, per preset."""


def report(
    parameters: Mapping[str, Any] | None = None, *, out: str | Path = "reports",
    preset: str = "small", notebooks: Sequence[str | Path] | None = None,
    timeout: int | None = None, jobs: int | None = None, gates: Sequence[Gate] = (),
    against: str | Path | None = None, say: Callable[[str], None] = print,
) -> list[Outcome]:  # fmt: skip
    """Run notebooks, by their paths or all of the project's, and make a report of them.

    It needs no network and no server: the folder ``out`` gets an ``index.html`` and, per notebook,
    a folder with ``page.html``, ``notebook.ipynb``, ``results.json``, ``status.json``, ``tables/``
    and ``figures/``, which appears when its notebook is done; for programs ``summary.json`` and
    ``junit.xml``. A failing notebook does not stop the others.

    - ``parameters``: values for the notebooks' parameters cells; those that one cannot take are
      refused first.
    - ``timeout``: seconds that a single cell may take; None takes :data:`CELL_SECONDS`.
    - ``jobs``: notebooks that run at a time, each with its share of the cores; None takes what
      cores and memory allow. The numbers are the same.
    - ``gates``: numbers that the report must reach; the summary says whether it has.
    - ``against``: an earlier report's folder or summary, to compare with.
    - ``say``: told when a notebook starts and ends, what came of the gates and the comparison,
      and where the index is.
    """
    preset_named(preset)
    for name, value in {"timeout": timeout, "jobs": jobs}.items():
        if value is not None:
            whole_number(name, value)
    chosen, folder, given = check_paths(notebooks), Path(out), dict(parameters or {})
    _check(given, chosen, folder)
    check_gates(gates, chosen)
    old = None if against is None else read_summary(Path(against))
    jobs, given = jobs or usual_jobs(len(chosen)), given | {"preset": preset}
    settings = Settings(given, timeout or CELL_SECONDS[preset], thread_limits(jobs))
    with ended_in_order(), _held(folder):
        publisher = Publisher(folder, given, gates, old)
        outcomes = _run_all(chosen, settings, publisher, jobs=jobs, say=say)
    _say(say, f"report: {folder / INDEX}")
    return outcomes


def _run_all(
    notebooks: Sequence[Path], settings: Settings, publisher: Publisher, *, jobs: int,
    say: Callable[[str], None],
) -> list[Outcome]:  # fmt: skip
    """Run the notebooks and publish anew whenever one ends; outcomes in their order."""
    found = {each: course_of(each, publisher.out / each.stem) for each in notebooks}
    order = in_order(found) if jobs > 1 else list(found)
    courses = {each.stem: found[each] for each in order}
    work = {each.stem: settings.run(each, publisher.out / each.stem) for each in order}
    state: dict[str, Outcome | None] = {}
    with (
        watched(courses, jobs) as see,
        closing(run_side_by_side(work, jobs, see)) as all_of_them,
    ):
        for name, outcome in all_of_them:
            state[name] = outcome
            if outcome is None:
                _say(say, f"{name}: started")
                continue
            courses[name].end()
            done = [end.folder for end in state.values() if end]
            waiting = {n: "running" if n in state else "waiting" for n in work if not state.get(n)}
            summary = publisher.write(done, waiting)
            left = time_text(seconds_left(courses, jobs)) if waiting else ""
            place = f"[{len(done)}/{len(work)}] {name}"
            _say(say, ", ".join(filter(None, [f"{place}: {outcome}", left])))
    for line in summary_lines(summary):
        _say(say, line)
    return [state[each.stem] for each in notebooks]


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder of a report; the lock goes with this process, however it ends."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(out, wait=False))
        except BlockingIOError:
            expected, hint = f"'{out}' for this report alone", "wait for its end, or name another"
            raise MoeeError(expected, "another report that is being made there", hint) from None
        except OSError:  # a file system without locks
            pass
        yield


def _say(say: Callable[[str], None], line: str) -> None:
    """Let ``say`` tell a line; a bar makes room for it."""
    with tqdm.external_write_mode():
        say(printable(line))


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
