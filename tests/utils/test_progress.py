from __future__ import annotations

import io
import itertools
import re
import sys

import pytest

from moee_analysis.utils.progress import is_headless, progress, tell_progress, unwatched


@pytest.fixture
def log(monkeypatch):
    """A plain log, in which a second passes whenever somebody asks for the time."""
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr("moee_analysis.utils.progress.time.monotonic", itertools.count().__next__)


@pytest.mark.usefixtures("log")
def test_a_log_gets_one_line_per_tenth_and_the_time_left(capsys):
    assert list(progress(range(40), label="working")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 4/40, 00:36 left"
    assert lines[-1] == "working: 40/40, took 00:40"
    assert len(lines) == 10


@pytest.mark.usefixtures("log")
def test_a_log_hears_nothing_of_what_is_soon_over(capsys):
    assert list(progress("ab", label="short")) == ["a", "b"]
    assert list(progress("abcd", label="longer")) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err == "longer: 4/4, took 00:04\n"


def a_screen(monkeypatch):
    """A terminal that remembers all that was written to it."""
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(sys, "stdout", written)
    return written


def test_a_terminal_gets_a_bar_that_stays_with_the_time_left(monkeypatch):
    screen = a_screen(monkeypatch)
    assert list(progress(range(3), label="working")) == [0, 1, 2]
    assert re.search(r"working: +0%.*0/3 \[00:00<\?", screen.getvalue())
    assert "3/3 [00:00<00:00" in last_line(screen)


def last_line(screen):
    """What stands in the lowest line that is not empty, after all that was written over."""
    lines = [line.split("\r")[-1].strip() for line in screen.getvalue().split("\n")]
    return [line for line in lines if line][-1]


def test_a_bar_within_a_bar_vanishes_when_it_is_full(monkeypatch):
    screen = a_screen(monkeypatch)
    for _ in progress(range(2), label="outer"):
        assert list(progress("ab", label="inner")) == ["a", "b"]
        assert "inner" not in last_line(screen)
    assert "inner" in screen.getvalue()
    assert last_line(screen).startswith("outer: 100%")


def test_a_bar_that_is_delayed_does_not_show_what_is_soon_over(monkeypatch):
    screen = a_screen(monkeypatch)
    assert list(progress("abc", label="short", delay=60)) == ["a", "b", "c"]
    assert "short" not in screen.getvalue()


def test_a_line_between_does_not_tear_a_bar(monkeypatch):
    screen = a_screen(monkeypatch)
    for _ in progress(range(2), label="working"):
        tell_progress("a line")
        assert re.search(r"\ra line\n", screen.getvalue())
    assert last_line(screen).startswith("working: 100%")


def test_a_length_can_be_given_or_be_unknown(capsys):
    assert list(progress(iter("abc"), label="known", total=3)) == ["a", "b", "c"]
    assert list(progress(iter("abc"), label="unknown")) == ["a", "b", "c"]
    assert "unknown" not in capsys.readouterr().err


def test_a_headless_notebook_gets_nothing(monkeypatch, capsys):
    monkeypatch.setenv("MOEE_HEADLESS", "1")
    assert is_headless()
    assert list(progress([1, 2], label="working")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_one_of_many_jobs_says_nothing_until_it_is_over(monkeypatch, capsys):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    with pytest.raises(ZeroDivisionError), unwatched():
        _fails_after_a_step()
    assert capsys.readouterr() == ("", "")
    tell_progress("the next job")
    assert capsys.readouterr().out == "the next job\n"


def _fails_after_a_step():
    tell_progress("a step")
    assert list(progress([1, 2], label="working")) == [1, 2]
    raise ZeroDivisionError
