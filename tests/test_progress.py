from __future__ import annotations

import sys

import pytest

from moee_analysis.progress import is_headless, progress, tell_progress, unwatched


def test_a_log_gets_one_line_per_tenth(monkeypatch, capsys):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert list(progress(range(40), label="working")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 4/40"
    assert lines[-1] == "working: 40/40"
    assert len(lines) == 10


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
