"""How far a report is said to be."""

import io
import json
import sys
from pathlib import Path

import pytest

from moee_analysis.report.runner import time_left
from moee_analysis.report.runner.time_left import Course, course_of, in_order, seconds_left, watched
from tests.helpers.notebooks import write_notebook


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    times = [100.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: times[0])
    monkeypatch.setattr(time_left, "AROUND", 0.0)
    return times


def play(expected, pace, jobs, clock, *, least):
    """Run cells that take ``pace`` times as long as expected; compare what is said of the rest."""
    courses = {str(n): Course(len(seconds), seconds) for n, seconds in enumerate(expected)}
    begins, ends, free = {}, {}, [clock[0]] * jobs
    for name, course in courses.items():
        free.sort()
        begins[name] = free[0]
        free[0] = ends[name] = free[0] + pace * sum(course.seconds)
    begun, over = clock[0], max(free)
    for percent in range(100):
        clock[0] = begun + (over - begun) * percent / 100
        for name, course in courses.items():
            done, at = 0, begins[name]
            for seconds in expected[int(name)]:
                at += pace * seconds
                done += at <= clock[0]
            if clock[0] >= begins[name]:
                course.see(done)
        left = seconds_left(courses, jobs)
        if percent >= 10 and over - clock[0] >= least:
            assert (over - clock[0]) / 2 <= left <= 2 * (over - clock[0]), percent
    return courses


@pytest.mark.parametrize("pace", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_after_a_tenth_the_time_left_is_told_within_a_factor_of_two(clock, pace, jobs):
    cells = ([0, 0, 5, 30, 2, 60], [0, 0, 9, 9, 9, 40, 9], [0, 0, 3, 20, 20], [0, 0, 4, 1, 12])
    play(cells, pace, jobs, clock, least=5 * pace)


def test_a_cell_that_makes_what_all_others_find_tells_nothing_of_their_pace(clock):
    courses = {"first": Course(4, [0.0, 6.0, 8.0, 6.0]), "second": Course(3, [0.0, 5.0, 45.0])}
    for ended, seconds in enumerate((6.0, 80.0, 6.0), start=1):
        courses["first"].see(ended)
        clock[0] += seconds
    courses["first"].see(4)
    assert seconds_left(courses, 1) == pytest.approx(50)


def test_nothing_is_told_where_nobody_knows(clock):
    courses = {"known": Course(2, [1.0, 9.0]), "new": Course(3, [])}
    courses["known"].see(1)
    clock[0] += 1
    assert seconds_left(courses, 2) is None
    courses["new"].see(2)
    courses["new"].end()  # it failed: what is left is known now
    assert seconds_left(courses, 2) is None  # but not yet how fast it goes
    courses["known"].see(2)
    assert seconds_left(courses, 2) == 0


def test_cells_are_expected_to_take_what_they_took_or_what_the_notebook_notes(tmp_path):
    path = write_notebook(tmp_path / "one.ipynb", "md:# Words", "1 + 1", "", "2 + 2")
    assert course_of(path, tmp_path / "none") == Course(4, [])  # with the parameters, twice
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
        return {"one": Course(3, []), "two": Course(4, [])}

    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    with watched(courses(), 2) as see:
        see("one", 2)
    assert capsys.readouterr().err == ""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with watched(courses(), 2) as see:
        for name, done, shown in (
            ("one", 0, "one starts   0%"),
            ("one", 1, "one 2/3  14%"),
            ("two", 2, "one 2/3, two 3/4  43%"),
            ("one", 3, "two 3/4  71%"),
        ):
            see(name, done)
            assert shown in screen.getvalue()


def test_the_shortest_notebook_begins_and_then_the_longest():
    seconds = {"a": [3.0], "b": [1.0], "c": [2.0]}
    courses = {Path(name): Course(1, own) for name, own in seconds.items()}
    assert [path.name for path in in_order(courses)] == ["b", "a", "c"]
