"""Commands that are ended at random moments: nothing is lost, and nothing is left behind."""

import os
import signal
import tempfile
import time

import nbformat
import numpy as np
import psutil
import pytest

from moee_analysis.utils.storage.locks import OURS
from tests.helpers.images import contents
from tests.helpers.processes import (
    begin,
    ended_at,
    extraction,
    finetuning,
    make_inputs,
    new_place,
    run_command,
    start,
)

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 1}
COMMANDS = ("extract", "extract without a store", "finetune")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(name, inputs, place, run):
    if name == "finetune":
        return finetuning(inputs, run, place / "out")
    return extraction(inputs, place / "out", place / "store" if name == "extract" else None)


def complete(place, target, *args):
    process = start(target, *args)
    process.join()
    assert process.exitcode == 0, (place / "printed").read_text()


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Where every command has finished that nobody ended, and how long it took."""
    found = {}
    for name in COMMANDS:
        place, begun = new_place(tmp_path_factory.mktemp("whole") / name), time.monotonic()
        run = found["extract"][0] / "out" if found else None
        complete(place, run_command, arguments(name, inputs, place, run), place)
        found[name] = place, time.monotonic() - begun
        assert not left(place)
    return found


def left(place):
    """Files and folders that should not be there when all is done."""
    found = [path for path in place.rglob("*") if path.name.startswith((".", "sums-", "damaged-"))]
    return [*found, *(place / "tmp").iterdir()]


def temporary(place):
    """Files and folders that are being filled."""
    return {path for path in place.rglob("*") if OURS in path.name} | {*(place / "tmp").iterdir()}


def end(number, seconds, *work):
    """Send a process the signal after so many seconds, and return its exit code."""
    process = start(*work)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ended_at_random_moments_comes_to_the_same_bytes(inputs, whole, tmp_path, name):
    rng, ended = np.random.default_rng(0), set()
    (right, seconds), run = whole[name], whole["extract"][0] / "out"
    for attempt in range(20):
        place = new_place(tmp_path / str(attempt))
        work = run_command, arguments(name, inputs, place, run), place
        for number, code in CODES.items():
            before = temporary(place)
            if number == signal.SIGKILL:
                found = ended_at(rng.integers(1, 10), number, *work)
            else:
                found = end(number, rng.uniform(0.1, seconds), *work)
            if found == 0:
                break
            ended.add(number)
            printed = (place / "printed").read_text() if (place / "printed").exists() else ""
            assert found in {code, -number}, printed
            if found == code and number != signal.SIGKILL:
                assert "nothing half-written was left behind" in printed.splitlines()[-1]
                assert "Traceback" not in printed
                assert temporary(place) <= before  # left by a SIGKILL, at most
        complete(place, *work)
        assert contents(place / "out") == contents(right / "out")
        assert not left(place)
        if ended == {*CODES}:
            return
    pytest.fail("it was never ended in time")


def report(notebook, place):
    from moee_analysis.report.runner.run_notebooks import report as run_notebooks

    begin(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", tempfile.tempdir)
        run_notebooks(out=place / "out", notebooks=[notebook], preset="smoke")


def test_a_report_takes_its_processes_with_it(tmp_path):
    go, notebook = tmp_path / "go", tmp_path / "tiny.ipynb"
    cell = nbformat.v4.new_code_cell('preset: str = "small"\nout: str = None')
    cell.metadata["tags"] = ["parameters"]
    work = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.1)"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(work)]), notebook
    )
    rng, place = np.random.default_rng(0), new_place(tmp_path / "report")
    for number in CODES:
        (place / "printed").unlink(missing_ok=True)
        process = start(report, notebook, place)
        while not (place / "printed").exists():  # from then on it hears signals
            process.join(0.02)
        process.join(rng.uniform(0.5, 5))
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        process.join()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert not (place / "out" / "tiny").exists()
        if number == signal.SIGTERM:
            assert process.exitcode == 143
            assert not list((place / "tmp").iterdir())
            front = {path.name for path in (place / "out").iterdir()}
            assert front == {"index.html", "junit.xml", "summary.json"}
            assert "has not ended" in (place / "out" / "junit.xml").read_text()
    go.touch()
    complete(place, report, notebook, place)
    assert {path.name for path in (place / "out").iterdir()} == {
        "index.html", "junit.xml", "summary.json", "tiny",
    }  # fmt: skip
    assert {path.name for path in (place / "out" / "tiny").iterdir()} == {
        "notebook.ipynb", "page.html", "status.json",
    }  # fmt: skip
    assert not list((place / "tmp").iterdir())
