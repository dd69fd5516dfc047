"""How JupyterLab and kernels are started."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyterlab_server.config import get_page_config

from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import jupyter
from moee_analysis.utils import environment


@pytest.fixture
def start_lab(monkeypatch):
    """Start a JupyterLab that only answers; its exit code, command and settings."""

    def start(*options, answers=(lambda: 0,)):
        started, waiting = {"ended": False}, iter(answers)

        class Lab:
            def __init__(self, command, *, env):
                folder = Path(env["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0])
                files = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
                settings = {k: v for file in files for k, v in file.items()}
                started.update(command=command, settings=settings, env=env)

            def wait(self):
                return next(waiting)()

            def terminate(self):
                started["ended"] = True

        monkeypatch.setattr(jupyter.subprocess, "Popen", Lab)
        try:
            return started | {"code": jupyter.open_lab(options)}
        except SystemExit as stop:
            return started | {"code": stop.code}

    return start


def test_a_kernel_of_another_interpreter_is_not_used(tmp_path, monkeypatch):
    foreign = tmp_path / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(json.dumps({"argv": ["/nowhere"], "display_name": "x", "language": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with jupyter.own_kernel() as environment:
        monkeypatch.setenv("JUPYTER_PATH", environment["JUPYTER_PATH"])
        assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable


def test_lab_opens_the_notebooks_with_the_user_s_options(start_lab, monkeypatch):
    """On the command line these win over settings that lie in files, as ours do."""
    options = ["--notebook-dir=/elsewhere", "--no-browser"]
    started = start_lab(*options)
    assert started["code"] == 0
    assert started["command"] == [sys.executable, "-m", "jupyterlab", *options]
    assert "moee-kernel-" in started["env"]["JUPYTER_PATH"]
    root = Path(started["settings"]["ServerApp"]["root_dir"])
    assert root / "notebooks" == environment.own_folder("notebooks")
    assert (root / "docs").is_dir()
    assert started["settings"]["LabApp"]["default_url"] == "/lab/tree/notebooks"
    # of an installed package
    inside = Path("package") / environment.SHIPPED / "notebooks"
    monkeypatch.setattr(jupyter, "own_folder", lambda _: inside)
    settings = start_lab()["settings"]
    assert settings["ServerApp"]["root_dir"] == str(inside)
    assert settings["LabApp"]["default_url"] == "/lab"
    # JupyterLab itself looks for its page's settings where ours are
    with jupyter._settings() as folder:
        monkeypatch.setenv("JUPYTER_CONFIG_PATH", folder)
        assert get_page_config([])["disabledExtensions"] == [jupyter.NEWS]


def test_lab_survives_ctrl_c_and_ends_with_the_command_that_has_started_it(start_lab):
    interrupt, terminate = (
        lambda number=number: signal.raise_signal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = start_lab(answers=[interrupt, lambda: 3])
    assert (started["code"], started["ended"]) == (3, False)
    started = start_lab(answers=[terminate, lambda: 0])
    assert (started["code"], started["ended"]) == (128 + signal.SIGTERM, True)
    signal.signal(signal.SIGINT, interrupted)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missing_jupyterlab_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(jupyter, "find_spec", lambda _: None)
    with pytest.raises(MoeeError, match="pip install jupyterlab") as refused:
        jupyter.open_lab()
    assert sys.executable in str(refused.value)
