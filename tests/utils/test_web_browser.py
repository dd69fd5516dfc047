"""Opening a page: where there is a screen, and never a browser that takes the terminal over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moee_analysis.utils import web_browser

VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


@pytest.mark.parametrize(
    ("platform", "variables", "opens"),
    [
        *[("linux", {name: "something"}, True) for name in VARIABLES],
        ("linux", {}, False), ("darwin", {}, True), ("darwin", {"MOEE_HEADLESS": "1"}, False),
    ],
)  # fmt: skip
def test_a_page_is_opened_where_there_is_a_screen(monkeypatch, platform, variables, opens):
    pages, page = [], Path("/with space.html")
    monkeypatch.setattr(web_browser.webbrowser, "open", lambda url: pages.append(url) or True)
    monkeypatch.setattr(sys, "platform", platform)
    for name in (*VARIABLES, "MOEE_HEADLESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert web_browser.open_page(page) is opens
    assert pages == ([page.as_uri()] if opens else [])


def test_the_path_of_a_page_that_cannot_be_opened_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(web_browser.webbrowser, "open", lambda _: False)
    assert not web_browser.open_page(tmp_path / "index.html")
    assert str(tmp_path / "index.html") in capsys.readouterr().out
