"""Commands that are ended at random moments: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time

import nbformat
import numpy as np
import psutil
import pytest

from moee_analysis.report.runner.run_notebooks import report
from moee_analysis.utils.storage.locks import OURS
from tests.helpers.images import contents
from tests.helpers.processes import (
    begin,
    extraction,
    finetuning,
    make_inputs,
    new_place,
    processes,
    run_command,
)

SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 1}
KILLS = 6  # at least, of every command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_report(notebook, place):
    begin(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", tempfile.tempdir)
        report(out=place / "out", notebooks=[notebook], preset="smoke")


def arguments(name, inputs, place, run):
    if name == "finetune":
        return finetuning(inputs, run, place / "out")
    store = None if name == "extract without a store" else place / "store"
    return extraction(inputs, place / "out", store)


def started(target, *args):
    process = processes().Process(target=target, args=args)
    process.start()
    return process


def ended(process, number, seconds):
    """Send the signal after so many seconds; whether the process had not ended before."""
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, number)
    process.join()
    return process.exitcode != 0


def left(place):
    """What should not be there when all is done."""
    found = [path for path in place.rglob("*") if path.name.startswith((".", "sums-", "damaged-"))]
    return [*found, *(place / "tmp").iterdir()]


def temporary(place):
    """Files and folders that are being filled."""
    return {path for path in place.rglob("*") if OURS in path.name} | {*(place / "tmp").iterdir()}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What every command comes to that nobody ends, and how long it takes."""
    found = {}
    for name in ("extract", "extract without a store", "finetune"):
        place = new_place(tmp_path_factory.mktemp("whole") / name)
        run = found["extract"][0] / "out" if found else None
        begun = time.monotonic()
        complete(place, run_command, arguments(name, inputs, place, run), place)
        found[name] = place, time.monotonic() - begun
        assert not left(place)
    return found


def complete(place, target, *args):
    process = started(target, *args)
    process.join()
    assert process.exitcode == 0, (place / "told").read_text()


@pytest.mark.parametrize("name", ["extract", "extract without a store", "finetune"])
def test_a_command_ended_at_random_moments_comes_to_the_same_bytes(inputs, whole, tmp_path, name):
    rng, kills = np.random.default_rng(0), 0
    (right, seconds), run = whole[name], whole["extract"][0] / "out"
    for attempt in range(20):
        place = new_place(tmp_path / str(attempt))
        args = run_command, arguments(name, inputs, place, run), place
        for number, code in list(SIGNALS.items()) * 2:
            before = temporary(place)
            process = started(*args)
            if not ended(process, number, rng.uniform(0.1, seconds)):
                break
            kills += 1
            told = (place / "told").read_text() if (place / "told").exists() else ""
            assert process.exitcode in {code, -number}, told
            if process.exitcode == code and number != signal.SIGKILL:
                assert "nothing half-written was left behind" in told.splitlines()[-1]
                assert "Traceback" not in told
                assert temporary(place) <= before  # what a SIGKILL has left, at most
        complete(place, *args)
        assert contents(place / "out") == contents(right / "out")
        assert not left(place)
        if kills >= KILLS:
            return
    pytest.fail("it was never ended in time")


@pytest.fixture
def go(tmp_path):
    """A file without which the notebook does not come to its end."""
    return tmp_path / "go"


@pytest.fixture
def notebook(tmp_path, go):
    cell = nbformat.v4.new_code_cell('preset: str = "small"\nout: str = None')
    cell.metadata["tags"] = ["parameters"]
    work = nbformat.v4.new_code_cell(
        f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.1)"
    )
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, work]), path)
    return path


@pytest.mark.parametrize("number", SIGNALS)
def test_a_report_takes_its_processes_with_it(notebook, go, tmp_path, number):
    rng, place = np.random.default_rng(int(number)), new_place(tmp_path / "report")
    for seconds in rng.uniform(0.5, 5, size=2):
        (place / "told").unlink(missing_ok=True)
        process = started(run_report, notebook, place)
        while not (place / "told").exists():  # from then on it hears signals
            process.join(0.02)
        process.join(seconds)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        process.join()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert not (place / "out" / "index.html").exists()
        if number == signal.SIGTERM:
            assert process.exitcode == 143
            assert not list((place / "tmp").iterdir())
            assert not list((place / "out").iterdir())
    go.touch()
    complete(place, run_report, notebook, place)
    assert {path.name for path in (place / "out").iterdir()} == {"index.html", "tiny"}
    assert {path.name for path in (place / "out" / "tiny").iterdir()} == {
        "notebook.ipynb", "page.html", "status.json",
    }  # fmt: skip
    assert not list((place / "tmp").iterdir())
