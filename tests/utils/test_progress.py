"""A bar for a person, a few lines for a log, nothing where nobody watches; pages on screens."""

import io
import re
import sys
from pathlib import Path

import pytest

from moee_analysis.utils.progress import is_headless, open_page, progress, tell_progress, unwatched

VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)


def open_screen(monkeypatch):
    """A terminal that remembers all that was written to it."""
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(sys, "stdout", written)
    return written


def last_line(screen):
    """The lowest line that is not empty, after all that was written over."""
    lines = [line.split("\r")[-1].strip() for line in screen.getvalue().split("\n")]
    return [line for line in lines if line][-1]


def test_a_log_gets_one_line_per_tenth_of_what_takes_long(monkeypatch, capsys):
    assert list(progress(range(40), label="short")) == list(range(40))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("moee_analysis.utils.progress.SHORT", 1e-9)
    assert list(progress(range(40), label="working")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"working: {done}/40, 00:00 left" for done in range(4, 41, 4)]
    assert list(progress(iter("abc"), label="given", total=3)) == ["a", "b", "c"]
    assert list(progress(iter("abcd"), label="unknown")) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err.splitlines()[-1] == "given: 3/3, 00:00 left"


def test_a_terminal_gets_a_bar_that_stays_with_the_time_left(monkeypatch):
    screen = open_screen(monkeypatch)
    assert list(progress(range(3), label="working")) == [0, 1, 2]
    assert re.search(r"working: +0%.*0/3 \[00:00<\?", screen.getvalue())
    assert "3/3 [00:00<00:00" in last_line(screen)


def test_bars_within_bars_vanish_and_lines_between_do_not_tear_them(monkeypatch):
    screen = open_screen(monkeypatch)
    for _ in progress(range(2), label="outer"):
        assert list(progress("ab", label="inner")) == ["a", "b"]
        assert "inner" not in last_line(screen)
        tell_progress("a line")
        assert re.search(r"\ra line\n", screen.getvalue())
    assert "inner" in screen.getvalue()
    assert last_line(screen).startswith("outer: 100%")


def test_a_bar_that_is_delayed_does_not_show_what_is_soon_over(monkeypatch):
    screen = open_screen(monkeypatch)
    assert list(progress("abc", label="short", delay=60)) == ["a", "b", "c"]
    assert "short" not in screen.getvalue()


def test_nothing_is_said_where_nobody_watches(monkeypatch, capsys):
    def fail_unwatched():
        with unwatched():
            tell_progress("a step")
            assert list(progress([1, 2], label="working")) == [1, 2]
            print(1 / 0)

    with pytest.raises(ZeroDivisionError):
        fail_unwatched()
    assert capsys.readouterr() == ("", "")
    tell_progress("the next job")
    assert capsys.readouterr() == ("", "the next job\n")
    monkeypatch.setenv("MOEE_HEADLESS", "1")
    assert is_headless()
    assert list(progress([1, 2], label="working")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("platform", "variables", "opens"), [
    *[("linux", {name: "something"}, True) for name in VARIABLES], ("linux", {}, False),
    ("darwin", {}, True), ("darwin", {"MOEE_HEADLESS": "1"}, False),
])  # fmt: skip
def test_a_page_is_opened_where_there_is_a_screen(monkeypatch, platform, variables, opens):
    pages, page = [], Path("/with space.html")
    monkeypatch.setattr("webbrowser.open", lambda url: pages.append(url) or True)
    monkeypatch.setattr(sys, "platform", platform)
    for name in (*VARIABLES, "MOEE_HEADLESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert open_page(page) is opens
    assert pages == ([page.as_uri()] if opens else [])


def test_the_path_of_a_page_that_cannot_be_opened_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert not open_page(tmp_path / "index.html")
    assert str(tmp_path / "index.html") in capsys.readouterr().out


def test_a_notebook_gets_one_line_that_is_gone_in_the_end(monkeypatch, capsys):
    monkeypatch.setattr("moee_analysis.utils.progress.is_in_notebook", lambda: True)
    assert list(progress(range(3), label="working")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert "working" in out
    assert not out.split("\r")[-2].strip()
    assert not err
