"""How JupyterLab is started; ``test_report.py`` has what the report asks of kernels."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import jupyter as kernel
from moee_analysis.utils import paths


@pytest.fixture
def asked(monkeypatch):
    """Commands that would have been started, each with the settings that lie ready for it."""
    found = []

    class Lab:
        def __init__(self, command, *, env):
            folder = Path(env["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0])
            files = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
            found.append((command, {k: v for file in files for k, v in file.items()}))

        def wait(self):
            return 0

    monkeypatch.setattr(kernel.subprocess, "Popen", Lab)
    return found


def test_lab_opens_the_checkout_at_its_notebooks(asked):
    assert kernel.open_lab() == 0
    [(command, settings)] = asked
    assert command == [sys.executable, "-m", "jupyterlab"]
    root = Path(settings["ServerApp"]["root_dir"])
    assert root / "notebooks" == paths.notebooks_folder()
    assert (root / "docs").is_dir()
    assert settings["LabApp"]["default_url"] == "/lab/tree/notebooks"


def test_lab_opens_the_notebooks_of_an_installed_package(asked, monkeypatch):
    inside = Path("package") / paths.SHIPPED / "notebooks"
    monkeypatch.setattr(kernel, "notebooks_folder", lambda: inside)
    kernel.open_lab()
    [(_, settings)] = asked
    assert settings["ServerApp"]["root_dir"] == str(inside)
    assert settings["LabApp"]["default_url"] == "/lab"


def test_lab_finds_that_the_plugin_of_the_news_is_off(monkeypatch):
    """JupyterLab itself looks for its page's settings where ours are."""
    from jupyterlab_server.config import get_page_config

    with kernel._settings() as folder:
        monkeypatch.setenv("JUPYTER_CONFIG_PATH", folder)
        assert get_page_config([])["disabledExtensions"] == [kernel.NEWS]


def test_lab_gets_the_user_s_options_on_its_command_line(asked):
    """There they win over settings that lie in files, as ours do."""
    kernel.open_lab(["--notebook-dir=/elsewhere", "--no-browser"])
    [(command, _)] = asked
    assert command[3:] == ["--notebook-dir=/elsewhere", "--no-browser"]


def test_lab_ends_with_the_command_that_has_started_it(monkeypatch):
    told = []

    class Lab:
        def __init__(self, command, *, env):
            self.waits = 0

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                signal.raise_signal(signal.SIGTERM)
            return 0

        def terminate(self):
            told.append("terminate")

    monkeypatch.setattr(kernel.subprocess, "Popen", Lab)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        kernel.open_lab()
    assert ended.value.code == 128 + signal.SIGTERM
    assert told == ["terminate"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missing_jupyterlab_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda _: None)
    with pytest.raises(MoeeError, match="pip install jupyterlab") as refused:
        kernel.open_lab()
    assert sys.executable in str(refused.value)
