"""A notebook in JupyterLab, as a newcomer meets it: Run All, then move a slider."""

import json
import socket
import subprocess
import sys
from collections import deque
from contextlib import contextmanager
from itertools import takewhile
from threading import Thread

import papermill
import pytest
from nbconvert import HTMLExporter

from moee_analysis.utils import environment
from tests.browser.conftest import set_for_a_while
from tests.helpers.notebooks import write_notebook

NAME = "03_class_specific_experts.ipynb"
TOKEN = "in-a-test"
RUN_MILLISECONDS = 300_000


@pytest.fixture
def notebooks(tmp_path):
    """A folder with notebook 03, which asks for little compute."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    text = (environment.own_folder("notebooks") / NAME).read_text(encoding="utf-8")
    asked = text.replace('preset: str = \\"small\\"', 'preset: str = \\"smoke\\"')
    assert asked != text
    (folder / NAME).write_text(asked, encoding="utf-8")
    return folder


@pytest.fixture
def lab(notebooks, store, tmp_path):
    """Address of a JupyterLab that ``moee lab`` has started on these notebooks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    private = {
        f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind) for kind in ("SETTINGS", "WORKSPACES")
    }
    options = [
        "--no-browser", "--allow-root", f"--port={port}", f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={notebooks}", "--LabApp.default_url=/lab",
    ]  # fmt: skip
    command = [sys.executable, "-m", "moee_analysis", "lab", *options]
    with set_for_a_while(**private), started(command):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def started(command):
    """A process that has said where it serves, and is over when this is."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        listener = Thread(target=deque, args=(process.stderr, 0))  # it goes on talking
        try:
            told = list(takewhile(lambda line: "is running at" not in line, process.stderr))
            assert process.poll() is None, "".join(told)
            listener.start()
            yield
        finally:
            process.terminate()
            listener.join()


def run_all(page):
    """Choose Run All in the menu, and wait until no cell is waiting any more."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-InputPrompt").get_by_text("[*]").first.wait_for(state="attached")
    page.wait_for_function(
        """() => ![...document.querySelectorAll(".jp-InputPrompt")]
        .some((prompt) => prompt.textContent.includes("*"))""",
        timeout=RUN_MILLISECONDS,
    )


def go_to(page, heading):
    """Jump to a heading by the table of contents."""
    page.get_by_role("tab", name="Table of Contents").click()
    page.locator(".jp-TableOfContents-content").get_by_text(heading, exact=True).click()


def saved(page, path):
    """The notebook as it is on disk after saving."""
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").first.wait_for(state="detached")
    return json.loads(path.read_text(encoding="utf-8"))


def open_again(page, where):
    """Shut the kernel down, and open the notebook as it was saved, in a new workspace."""
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Shut Down Kernel", exact=True).click()
    page.get_by_text("No Kernel").first.wait_for()
    page.goto(f"{where}&reset")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)


def test_notebook_03_runs_its_slider_changes_the_figure_which_stays_without_a_kernel(
    lab, notebooks, open_page, shots
):
    where = f"{lab}/lab/tree/{NAME}?token={TOKEN}"
    # the panel without its kernel; an attached picture, which Chromium asks for before JupyterLab
    known = ["widget model not found", "ERR_UNKNOWN_URL_SCHEME"]
    page = open_page(where, width=1280, height=1000, known=known)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)
    run_all(page)
    go_to(page, "Any class, any layer")
    figure = page.locator(".jp-OutputArea img[alt*='layer ']").first
    figure.wait_for(timeout=20_000)
    page.screenshot(path=shots / "lab.png")
    before = figure.get_attribute("src"), figure.get_attribute("alt")
    assert not page.locator(".moee-still").is_visible()
    slider = page.locator(".jp-OutputArea .noUi-handle").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([node, src]) => node.isConnected && node.src !== src || "
        "document.querySelector(\".jp-OutputArea img[alt*='layer ']\").src !== src",
        arg=[figure.element_handle(), before[0]],
    )
    changed = page.locator(".jp-OutputArea img[alt*='layer ']").first
    assert changed.get_attribute("alt") != before[1]
    page.screenshot(path=shots / "lab_slider_moved.png")
    cells = saved(page, notebooks / NAME)["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in ran)
    assert not [o for cell in ran for o in cell["outputs"] if o["output_type"] == "error"]
    open_again(page, where)
    go_to(page, "Any class, any layer")
    dead = page.get_by_text("Error displaying widget")
    dead.wait_for(state="attached")
    assert not dead.is_visible()
    assert page.locator(".moee-still img[alt*='layer ']").get_attribute("src") == before[0]
    assert page.locator(".moee-still img").is_visible()
    page.screenshot(path=shots / "lab_without_kernel.png")


PANEL = """import matplotlib.pyplot as plt
from moee_analysis.report.explore import explore
def draw(layer):
    fig, ax = plt.subplots(figsize=(3, 2))
    return fig
explore(draw, layer=[0, 1])"""


def test_a_panel_that_papermill_ran_is_a_figure_in_the_page_that_nbconvert_makes(
    tmp_path, open_page, monkeypatch
):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    ran, exported = tmp_path / "ran.ipynb", tmp_path / "page.html"
    papermill.execute_notebook(write_notebook(tmp_path / "a.ipynb", PANEL), ran)
    exported.write_text(HTMLExporter().from_filename(ran)[0], encoding="utf-8")
    page = open_page(exported.as_uri(), known=["net::ERR_", "require"])  # for widgets that live
    assert page.locator(".moee-still img").is_visible()
