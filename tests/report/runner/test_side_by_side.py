"""Notebooks side by side, and reports side by side."""

import json

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import run_notebooks
from moee_analysis.report.runner.run_notebooks import THREADS, report, thread_limits, usual_jobs
from tests.helpers.notebooks import write_notebook

SHARES = """from pathlib import Path
from moee_analysis.utils.storage.store import get_or_resume
def build(folder):
    (folder / "made").write_text(out)
    with open("{log}", "a") as log:
        log.write("built ")
folder = get_or_resume(Path("{store}"), "activations-0", build)
assert (folder / "made").is_file()"""
THREADS_TOLD = """import json, os, numba, torch
told = [os.environ["MKL_NUM_THREADS"], torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS]
print(json.dumps(told))"""


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight cores, without a GPU or a word about threads."""
    monkeypatch.setattr(run_notebooks, "cpu_count", lambda: 8)
    monkeypatch.setattr(run_notebooks, "memory", lambda: (64e9, 32e9))
    monkeypatch.setattr(run_notebooks.torch.cuda, "is_available", lambda: False)
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_as_many_run_at_a_time_as_cores_memory_and_notebooks_allow(machine):
    assert usual_jobs(10) == 8
    assert usual_jobs(3) == 3
    for free, jobs in ((6e9, 2), (1e9, 1)):
        machine.setattr(run_notebooks, "memory", lambda free=free: (64e9, free))
        assert usual_jobs(10) == jobs
    machine.setattr(run_notebooks.torch.cuda, "is_available", lambda: True)
    assert usual_jobs(10) == 1


def test_each_takes_its_share_of_the_threads_or_what_the_user_allows(machine):
    assert thread_limits(1) == dict.fromkeys(THREADS, "8")
    assert thread_limits(3) == dict.fromkeys(THREADS, "2")
    assert thread_limits(20) == dict.fromkeys(THREADS, "1")
    machine.setenv("OMP_NUM_THREADS", "3")
    machine.setenv("MKL_NUM_THREADS", "64")
    machine.setenv("NUMBA_NUM_THREADS", "1")
    told = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    assert thread_limits(1) == told | {"NUMBA_NUM_THREADS": "1"}
    assert thread_limits(4)["OMP_NUM_THREADS"] == "2"
    machine.setenv("OMP_NUM_THREADS", "4,2")  # by level: not for us to judge
    assert thread_limits(1)["OMP_NUM_THREADS"] == "8"


def test_notebooks_at_a_time_share_the_store_and_the_cores(machine, tmp_path):
    names = [f"{number:02d}_shares" for number in range(3)]
    cell = SHARES.format(log=tmp_path / "log", store=tmp_path / "store")
    paths = [write_notebook(tmp_path / f"{n}.ipynb", cell, THREADS_TOLD) for n in names]
    out, lines = tmp_path / "out", []
    machine.setattr(run_notebooks, "tell", lines.append)
    outcomes = report(out=out, notebooks=paths, jobs=3)
    assert [(done.notebook, done.ok) for done in outcomes] == [(name, True) for name in names]
    assert (tmp_path / "log").read_text() == "built "  # once, whoever was first
    assert sum(line.endswith(": started") for line in lines[:3]) == 3
    for name in names:
        cells = json.loads((out / name / "notebook.ipynb").read_text())["cells"]
        assert json.loads("".join(cells[-1]["outputs"][0]["text"])) == ["2", 2, 2]


def test_two_reports_at_once_need_two_folders(tmp_path, monkeypatch):
    notebook, place = write_notebook(tmp_path / "one.ipynb", "1 + 1"), tmp_path / "out"
    held = []

    def meanwhile(line):
        if line == "one: started":
            monkeypatch.setattr(run_notebooks, "tell", held.append)
            with pytest.raises(MoeeError, match="another report that is being made there"):
                report(out=place, notebooks=[notebook])
            [done] = report(out=tmp_path / "other", notebooks=[notebook])
            assert done.ok

    monkeypatch.setattr(run_notebooks, "tell", meanwhile)
    [done] = report(out=place, notebooks=[notebook])
    assert done.ok
    assert held
    [done] = report(out=place, notebooks=[notebook])  # the folder is free again
    assert done.ok
