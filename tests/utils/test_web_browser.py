"""Opening a page: where there is a screen, and never a browser that takes the terminal over."""

from __future__ import annotations

import sys

import pytest

from moee_analysis.utils import web_browser as browser

NO_SCREEN = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


@pytest.fixture
def opened(monkeypatch):
    pages = []
    monkeypatch.setattr(browser.webbrowser, "open", lambda url: pages.append(url) or True)
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    for name in NO_SCREEN:
        monkeypatch.delenv(name, raising=False)
    return pages


def test_without_a_screen_the_path_is_told(opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    assert not browser.open_page(tmp_path / "index.html")
    assert opened == []
    assert str(tmp_path / "index.html") in capsys.readouterr().out


@pytest.mark.parametrize("name", NO_SCREEN)
def test_with_a_screen_the_page_is_opened(opened, monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(name, "something")
    assert browser.open_page(tmp_path / "with space.html")
    assert opened == [(tmp_path / "with space.html").as_uri()]
    assert capsys.readouterr().out == ""


def test_a_desktop_always_has_one_and_a_headless_run_never(opened, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert browser.has_screen()
    monkeypatch.setenv("MOEE_HEADLESS", "1")
    assert not browser.has_screen()


def test_a_browser_that_does_not_start_is_no_failure(opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(browser.webbrowser, "open", lambda _: False)
    assert not browser.open_page(tmp_path / "index.html")
    assert "index.html" in capsys.readouterr().out
