"""How far a report is said to be."""

import io
import json
import sys
from pathlib import Path

import pytest

from moee_analysis.report.runner import time_left
from moee_analysis.report.runner.time_left import Course, course_of, in_order, watching
from tests.helpers.notebooks import write_notebook


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    times = [100.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: times[0])
    return times


def test_what_is_left_takes_as_long_as_what_was_second_by_second(clock):
    courses = {"one": Course([0.0, 5.0, 30.0]), "two": Course([0.0, 15.0])}
    with watching(courses) as watch:
        assert watch.left() == ""  # nothing has ended yet
        watch.see("one", 2)
        clock[0] += 10.0  # twice the time that was expected
        assert watch.left() == "about 01:30 left"
        courses["one"].end()  # it failed: its other cells will not run
        assert watch.left() == "about 00:30 left"
        watch.see("two", 2)
        assert watch.left() == "about 00:00 left"


def test_cells_are_expected_to_take_what_they_took_or_what_the_notebook_notes(tmp_path):
    path = write_notebook(tmp_path / "one.ipynb", "md:# Words", "1 + 1", "", "2 + 2")
    assert course_of(path, tmp_path / "none").seconds == [0, 1, 1, 1]
    notebook = json.loads(path.read_text())
    notebook["cells"][3]["metadata"]["moee"] = {"seconds": 7}
    path.write_text(json.dumps(notebook))
    assert course_of(path, tmp_path / "none").seconds == [0, 0, 7, 0]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]
    ran = [
        cell | {"metadata": {"papermill": {"duration": seconds}}}
        for seconds, cell in enumerate([code[0], *code])
    ]
    (tmp_path / "earlier").mkdir()
    earlier = tmp_path / "earlier" / "notebook.ipynb"
    earlier.write_text(json.dumps(notebook | {"cells": ran}))
    assert course_of(path, tmp_path / "earlier").seconds == [0, 1, 2, 3]
    earlier.write_text(json.dumps(notebook | {"cells": ran[:3]}))  # of another notebook
    assert course_of(path, tmp_path / "earlier").seconds == [0, 0, 7, 0]


def test_the_bar_shows_the_share_of_all_cells_and_a_log_sees_none(monkeypatch, capsys):
    def courses():
        return {"one": Course([1.0] * 3), "two": Course([1.0] * 4)}

    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    with watching(courses()) as watch:
        watch.see("one", 2)
    assert capsys.readouterr().err == ""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with watching(courses()) as watch:
        for name, done, shown in (
            ("one", 0, "one starts   0%"),
            ("one", 1, "one 2/3  14%"),
            ("two", 2, "one 2/3, two 3/4  43%"),
            ("one", 3, "two 3/4  71%"),
        ):
            watch.see(name, done)
            assert shown in screen.getvalue()


def test_the_shortest_notebook_begins_and_then_the_longest():
    seconds = {"a": [3.0], "b": [1.0], "c": [2.0]}
    courses = {Path(name): Course(own) for name, own in seconds.items()}
    assert [path.name for path in in_order(courses)] == ["b", "a", "c"]
