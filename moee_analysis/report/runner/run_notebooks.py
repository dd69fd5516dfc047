"""The report: notebooks run side by side through papermill, and the pages made of them."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.report.notebook.results import STATUS
from moee_analysis.report.pages.site import INDEX
from moee_analysis.report.runner import time_left
from moee_analysis.report.runner.choose import check_parameters, check_paths
from moee_analysis.report.runner.one_notebook import Outcome, Settings, Steps
from moee_analysis.report.runner.publish import publish
from moee_analysis.report.summary.gates import Gate, check_gates
from moee_analysis.report.summary.summary import read_summary, summary_lines
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.environment import memory
from moee_analysis.utils.progress import tell
from moee_analysis.utils.signals import ended_in_order
from moee_analysis.utils.storage.locks import locked
from moee_analysis.utils.storage.refusals import check_place, writing

CELL_SECONDS = {"smoke": 600, "small": 3600, "full": 6 * 3600}  # of a single cell, at most
MEMORY = 2.5e9  # bytes that a notebook takes at most, on the bundled images
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
LOOK_SECONDS = 0.2  # between looks at how far the notebooks are


def report(
    parameters: Mapping[str, Any] | None = None, *, out: str | Path = "reports",
    preset: str = "small", notebooks: Sequence[str | Path] | None = None, jobs: int | None = None,
    gates: Sequence[Gate] = (), against: str | Path | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run notebooks, by their paths or all of the project's, and make a report of them.

    The folder ``out`` gets ``index.html``, ``summary.json`` and ``junit.xml`` and, when a notebook
    is done, a folder with ``page.html``, ``notebook.ipynb``, ``results.json``, ``status.json``,
    ``tables/`` and ``figures/``. A failing notebook does not stop the others.

    - ``parameters``: of the notebooks' parameters cells; what one cannot take is refused first.
    - ``jobs``: notebooks at a time, each with its share of the cores; None takes what cores and
      memory allow. The numbers are the same.
    - ``gates``: numbers that the report must reach; the summary says whether it has.
    - ``against``: an earlier report's folder or summary, to compare with.
    """
    preset_named(preset)
    if jobs is not None:
        whole_number("jobs", jobs)
    chosen, folder, given = check_paths(notebooks), Path(out), dict(parameters or {})
    _check(given, chosen, folder)
    check_gates(gates, chosen)
    old = None if against is None else read_summary(Path(against))
    jobs, given = jobs or usual_jobs(len(chosen)), given | {"preset": preset}
    settings = Settings(folder, given, CELL_SECONDS[preset], thread_limits(jobs), gates, old)
    with ended_in_order(), _held(folder):
        outcomes = _run_all(chosen, settings, jobs)
    tell(f"report: {folder / INDEX}")
    return outcomes


def _run_all(notebooks: Sequence[Path], settings: Settings, jobs: int) -> list[Outcome]:
    """Run the notebooks and publish anew whenever one ends; outcomes in their order."""
    found = {each: time_left.course_of(each, settings.out / each.stem) for each in notebooks}
    order = time_left.in_order(found) if jobs > 1 else list(found)
    courses = {each.stem: found[each] for each in order}
    work = {each.stem: settings.run(each) for each in order}
    state: dict[str, Outcome | None] = {}
    publish(settings, [], dict.fromkeys(work, "waiting"))  # in the place of an earlier front
    with (
        time_left.watching(courses) as watch,
        closing(run_side_by_side(work, jobs, watch.see)) as ran,
    ):
        for name, outcome in ran:
            state[name] = outcome
            if outcome is None:
                tell(f"{name}: started")
                continue
            courses[name].end()
            done = [end.folder for end in state.values() if end]
            waiting = {n: "running" if n in state else "waiting" for n in work if not state.get(n)}
            summary = publish(settings, done, waiting)
            left = watch.left() if waiting else ""
            place = f"[{len(done)}/{len(work)}] {name}"
            tell(", ".join(filter(None, [f"{place}: {outcome}", left])))
    for line in summary_lines(summary):
        tell(line)
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


def _check(given: Mapping[str, Any], notebooks: Sequence[Path], out: Path) -> None:
    """Refuse parameters that do not fit, and a place where anything but a report would be lost."""
    check_place(out / INDEX)
    for notebook in notebooks:
        check_parameters(notebook, given)
        folder = out / notebook.stem
        if folder.exists() and not (folder / STATUS).is_file():
            hint = "choose another folder for the report"
            raise MoeeError(f"'{folder}' to be free or an earlier report", "something else", hint)


def usual_jobs(notebooks: int) -> int:
    """How many of so many run at a time: one for each core and :data:`MEMORY`; one on a GPU."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(cpu_count(), int(memory()[1] / MEMORY), notebooks))


def thread_limits(jobs: int) -> dict[str, str]:
    """What libraries read of their threads: a share of the cores, or the user's number if less."""
    share, texts = max(1, cpu_count() // jobs), {name: os.environ.get(name, "") for name in THREADS}
    given = {name: int(text) for name, text in texts.items() if text.isdigit()}
    allowed = {name: (share, given.get(name), given.get(THREADS[0])) for name in THREADS}
    return {name: str(min(filter(None, numbers))) for name, numbers in allowed.items()}


def run_side_by_side(
    notebooks: Mapping[str, Steps], jobs: int, see: Callable[[str, int], None]
) -> Iterator[tuple[str, Outcome | None]]:
    """Run notebooks, by name, ``jobs`` at a time; yield each when it starts (None) and ends.

    ``see`` is told again and again how many cells of one have ended. All are in the main thread,
    where signals arrive: closing this closes them.
    """
    waiting, running = dict(notebooks), {}
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = next(iter(waiting))
                running[name] = stack.enter_context(closing(waiting.pop(name)))
                yield name, None
            for name, steps in list(running.items()):
                try:
                    see(name, next(steps))
                except StopIteration as end:
                    del running[name]
                    yield name, end.value
            time.sleep(LOOK_SECONDS)
