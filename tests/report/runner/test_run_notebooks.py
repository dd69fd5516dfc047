from __future__ import annotations

import json
import os
import re
import signal
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from moee_analysis.errors import MoeeError
from moee_analysis.report.pages.html import standing_alone
from moee_analysis.report.pages.page import read_story
from moee_analysis.report.pages.solutions import folded
from moee_analysis.report.runner import jupyter as kernel
from moee_analysis.report.runner.check_parameters import check_parameters
from moee_analysis.report.runner.run_notebooks import report
from tests.helpers.notebooks import write_notebook

DESCRIBED = "All 1200 pixels are teal. a &lt;teal&gt; one"
ENDLESS = "while True: pass"
KEEPS_A_PICTURE = """import io, json, os, pathlib
from PIL import Image
folder = pathlib.Path(out)
(folder / "figures").mkdir()
Image.new("RGB", (40, 30), "teal").save(folder / "figures" / "one.png")
one = {"file": "figures/one.png", "finding": "All 1200 pixels are teal.", "caption": "a <teal> one"}
claims = [
    {"statement": "s", "found": "f", "holds": True, "verdict": "✓ holds"},
    {"statement": "<t>", "found": "g", "holds": False, "verdict": "✗ does not", "ours": True},
]
headline = {"label": "of <everything>", "value": 0.4567, "dense": "<all> of it"}
found = {"figures": {"one": one}, "claims": claims, "headline": headline}
found |= {"values": {"number": number}}
(folder / "results.json").write_text(json.dumps(found | {"parameters": {"preset": preset}}))"""
REMOTE = """from IPython.display import HTML, Javascript
display(Javascript("alert(1)"))
HTML('<img src="https://example.org/a.png"><script src="https://example.org/a.js"></script>'
     '<style>@import url(https://example.org/a.css);</style><p onclick="x()">kept</p>')"""
NOTEBOOKS = {
    "fine": [
        "md:![far](https://example.org/far.png) <script src='https://example.org/b.js'></script>",
        KEEPS_A_PICTURE,
        REMOTE,
        "md:### Exercise 1. Twice\n\nHow many are twice as many?",
        "solution:twice = 2 * number",
        "solution:print(f'{twice} are twice as many')",
        "md:### Exercise 2. Thrice\n\nAnd thrice?",
        "solution:3 * number",
        "import sys; print(sys.executable, number, share, layers, out)",
    ],
    "error": ["print('before')", "raise ValueError('the <cell> failed')", "print('after')"],
    "slow": ["print('before')", ENDLESS],
    "killed": [KEEPS_A_PICTURE, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
    "gone": ["import os\nos._exit(0)"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of notebooks that end in every way a notebook can end."""
    folder = tmp_path_factory.mktemp("with {braces} and spaces")
    paths = [write_notebook(folder / f"{name}.ipynb", *cells) for name, cells in NOTEBOOKS.items()]
    lines: list[str] = []
    given = {"number": 7, "share": 1, "layers": [3, 4]}
    outcomes = report(
        given, out=folder / "out", preset="smoke", notebooks=paths, timeout=2, say=lines.append
    )
    return folder / "out", {outcome.notebook: outcome for outcome in outcomes}, lines


def _status(out: Path, name: str) -> dict:
    return json.loads((out / name / "status.json").read_text())


def test_every_ending_is_told_apart(made):
    out, outcomes, _ = made
    expected = {
        "fine": ("ok", None),
        "error": ("cell_error", 3),
        "slow": ("timeout", 3),
        "killed": ("dead_kernel", 3),
        "gone": ("dead_kernel", 2),
    }
    # papermill adds one cell with the injected parameters before the notebook's own
    for name, (status, cell) in expected.items():
        told = _status(out, name)
        assert told["status"] == outcomes[name].status == status
        assert told.get("cell") == outcomes[name].cell == (cell and cell + 1)
        assert outcomes[name].ok == (status == "ok")
        assert outcomes[name].page.is_file()


def test_a_cell_error_is_named_with_its_traceback(made):
    out, outcomes, _ = made
    assert outcomes["error"].error == "ValueError: the <cell> failed"
    assert "raise ValueError" in _status(out, "error")["traceback"]
    page = outcomes["error"].page.read_text()
    assert "ValueError: the &lt;cell&gt; failed" in page
    assert "Execution using papermill" not in page


@pytest.mark.parametrize("name", ["slow", "killed", "gone"])
def test_no_notebook_that_looks_complete_survives_a_timeout_or_a_dead_kernel(made, name):
    out, outcomes, _ = made
    assert not list((out / name).glob("*.ipynb"))
    assert 'class="banner"' in outcomes[name].page.read_text()


def test_what_was_kept_before_the_kernel_died_is_shown(made):
    out, outcomes, _ = made
    page = outcomes["killed"].page.read_text()
    assert "Kept before it stopped" in page
    assert f'alt="{DESCRIBED}"' in page
    assert (out / "killed" / "results.json").is_file()


def test_parameters_reach_the_notebook_and_the_kernel_is_this_interpreter(made):
    out, _, _ = made
    executed = nbformat.read(out / "fine" / "notebook.ipynb", as_version=4)
    printed = executed.cells[-1].outputs[0].text
    assert printed.startswith(f"{sys.executable} 7 1 [3, 4] ")
    assert json.loads((out / "fine" / "results.json").read_text())["values"] == {"number": 7}


def test_the_executed_notebook_names_the_report_s_folder(made):
    out, _, _ = made
    executed = nbformat.read(out / "fine" / "notebook.ipynb", as_version=4)
    told = executed.metadata.papermill
    assert told.parameters["out"] == str(out / "fine")
    assert told.input_path == "fine.ipynb"


def test_a_notebook_that_names_no_kernel_runs_too(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "print(number)")
    notebook = nbformat.read(path, as_version=4)
    del notebook.metadata["kernelspec"]
    nbformat.write(notebook, path)
    (outcome,) = report({"number": 3}, out=tmp_path / "out", preset="smoke", notebooks=[path])
    assert outcome.ok, outcome.error


def test_a_kernel_of_another_interpreter_is_not_used(tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    foreign = tmp_path / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(json.dumps({"argv": ["/nowhere"], "display_name": "x", "language": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with kernel.own_kernel() as environment:
        monkeypatch.setenv("JUPYTER_PATH", environment["JUPYTER_PATH"])
        assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable


def test_lab_opens_the_notebooks_with_this_interpreter_and_survives_ctrl_c(monkeypatch):
    started = []

    class Lab:
        def __init__(self, command, *, env):
            started.append((command, env))
            self.answers = iter([KeyboardInterrupt, 3])

        def wait(self):
            answer = next(self.answers)
            if answer is KeyboardInterrupt:
                raise KeyboardInterrupt
            return answer

    monkeypatch.setattr(kernel.subprocess, "Popen", Lab)
    assert kernel.open_lab() == 3
    [(command, environment)] = started
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "moee-kernel-" in environment["JUPYTER_PATH"]


def test_nothing_but_the_report_is_left(made):
    out, _, _ = made
    assert sorted(p.name for p in out.iterdir()) == sorted([*NOTEBOOKS, "index.html"])


def test_the_terminal_hears_of_every_start_and_end_and_of_the_index(made):
    out, _, lines = made
    assert lines[0] == "[1/5] fine: started"
    assert re.fullmatch(r"\[1/5\] fine: ok after \d+ s", lines[1])
    assert re.match(r"\[2/5\] error: cell error after \d+ s in cell 4: ValueError", lines[3])
    assert lines[-1] == f"report: {out / 'index.html'}"


class _Loads(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            loads = name in ("src", "srcset", "poster", "data") or (
                tag == "link" and name == "href"
            )
            if (loads and not (value or "").startswith("data:")) or name.startswith("on"):
                self.found.append(f"<{tag} {name}={value}>")
        if tag in ("script", "iframe", "object", "embed", "link", "base"):
            self.found.append(f"<{tag}>")


@pytest.mark.parametrize("page", ["index.html", *(f"{name}/page.html" for name in NOTEBOOKS)])
def test_pages_stand_alone(made, page):
    out, _, _ = made
    text = (out / page).read_text()
    reader = _Loads()
    reader.feed(text)
    assert reader.found == []
    assert "default-src 'none'" in text
    styles = re.findall(r"<style.*?</style>", text, flags=re.DOTALL)
    assert not [style for style in styles if "@import" in style or "url(" in style]


def test_a_page_keeps_what_is_harmless(made):
    out, _, _ = made
    page = (out / "fine" / "page.html").read_text()
    assert ">kept</p>" in page
    assert '<a href="https://example.org/far.png">far</a>' in page
    assert re.search(r"<h1[^>]*>The fine notebook</h1>", page)


def test_solutions_are_folded_and_the_cells_of_one_share_a_fold(made):
    out, _, _ = made
    page = BeautifulSoup((out / "fine" / "page.html").read_text(), "html.parser")
    first, second = page.find_all("details")
    assert not first.has_attr("open")
    assert first.contents[0].name == "summary"
    assert "twice = 2 * number" in first.get_text()
    assert "14 are twice as many" in first.get_text()
    assert "21" in second.get_text()
    assert "Thrice" in second.find_previous_sibling().get_text()


def test_a_solution_that_failed_stands_open():
    cell = '<div class="cell code_cell celltag_solution"><div class="{}">1 / 0</div></div>'
    assert '<details class="solution"><summary>' in folded(cell.format("output_text"))
    assert '<details class="solution" open="">' in folded(cell.format("output_error"))


def test_the_index_has_a_card_for_each_notebook(made):
    out, _, _ = made
    index = (out / "index.html").read_text()
    assert index.count('<article class="card">') == len(NOTEBOOKS)
    for name in NOTEBOOKS:
        assert f'href="{name}/page.html">The {name} notebook</a>' in index
    assert "1 of 5 notebooks ran to their end. Of 2 claims of the paper, 2 hold here." in index
    assert 'src="data:image/webp;base64,' in index
    assert f'alt="{DESCRIBED}"' in index


def _refused(tmp_path, parameters, match, **options):
    notebook = write_notebook(tmp_path / "one.ipynb", "1 / 0")
    with pytest.raises(MoeeError, match=match):
        report(parameters, out=tmp_path / "out", notebooks=[notebook], **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"numbr": 2}, "'numbr'"),
        ({"number": "2"}, "'number' to be int"),
        ({"number": True}, "'number' to be int"),
        ({"number": 2.0}, "'number' to be int"),
        ({"number": None}, "'number' to be int"),
        ({"share": "0.5"}, "'share' to be float"),
        ({"share": float("nan")}, "'share' to be float"),
        ({"name": Path("a")}, "'name' to be str"),
        ({"layers": (3, 4)}, "'layers' to be list"),
        ({"layers": [Path("a")]}, "'layers' to be list"),
        ({"out": "somewhere"}, "'out' as an argument"),
    ],
)
def test_a_typo_or_a_wrong_type_is_refused_before_anything_runs(tmp_path, parameters, match):
    _refused(tmp_path, parameters, match)


def test_an_unknown_preset_is_refused_with_the_list_of_presets(tmp_path):
    _refused(tmp_path, {}, "smoke, small, full", preset="smok")


def test_none_is_taken_where_the_notebook_says_none(tmp_path):
    notebook = write_notebook(tmp_path / "one.ipynb")
    check_parameters(notebook, {"folder": None, "share": 1})


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ("n: int | None = None\npreset: str = 'a'\nout: str = None", "n written otherwise"),
        ("s: str = 'a=b'\npreset: str = 'a'\nout: str = None", "s written otherwise"),
        ("preset: str = 'a'", "a parameter 'out'"),
        ("preset: str = ", "Python in the parameters cell"),
    ],
)
def test_a_parameters_cell_that_papermill_misreads_is_refused(tmp_path, parameters, match):
    notebook = write_notebook(tmp_path / "one.ipynb", parameters=parameters)
    with pytest.raises(MoeeError, match=match):
        check_parameters(notebook, {})


def test_missing_and_foreign_notebooks_are_refused(tmp_path):
    foreign = tmp_path / "foreign.ipynb"
    foreign.write_text("not JSON")
    for path in (foreign, tmp_path / "missing.ipynb"):
        with pytest.raises(MoeeError, match="a notebook"):
            report(out=tmp_path / "out", notebooks=[path])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda notebook: notebook["metadata"].update(kernelspec=5),
        lambda notebook: notebook["metadata"]["kernelspec"].pop("display_name"),
        lambda notebook: notebook["cells"][1].pop("source"),
        lambda notebook: notebook["cells"][1]["metadata"].update(tags=5),
    ],
)
def test_a_notebook_that_breaks_the_format_is_refused_before_anything_runs(tmp_path, spoil):
    path = write_notebook(tmp_path / "one.ipynb", "1 / 0")
    notebook = json.loads(path.read_text())
    spoil(notebook)
    path.write_text(json.dumps(notebook))
    with pytest.raises(MoeeError, match="found NotebookValidationError: "):
        report(out=tmp_path / "out", notebooks=[path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["caf\udce9.ipynb", "caf\udce9/a.ipynb", "a\0b.ipynb", 5])
def test_paths_that_cannot_be_written_down_are_refused(tmp_path, name):
    with pytest.raises(MoeeError, match="the path of a notebook, in UTF-8"):
        report(out=tmp_path / "out", notebooks=[name])


def test_two_notebooks_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    twins = [write_notebook(tmp_path / name) for name in ("a.ipynb", "b/a.ipynb")]
    with pytest.raises(MoeeError, match="'a' twice"):
        report(out=tmp_path / "out", notebooks=twins)


def test_a_folder_that_is_no_report_is_left_alone(tmp_path):
    notebook = write_notebook(tmp_path / "thesis.ipynb")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(MoeeError, match="free or an earlier report"):
        report(out=tmp_path, notebooks=[notebook])


@pytest.fixture
def heard_ctrl_c():
    """Ctrl-C as in a terminal: what a shell starts in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_leaves_the_earlier_page_and_nothing_half_written(tmp_path):
    """The cell itself presses Ctrl-C, once it runs, and then never ends."""
    earlier = tmp_path / "out" / "endless"
    earlier.mkdir(parents=True)
    (earlier / "status.json").write_text("{}")
    notebook = write_notebook(
        tmp_path / "endless.ipynb",
        "import os, pathlib, signal",
        "pathlib.Path(name).write_text(str(os.getpid()))",
        f"os.kill(number, signal.SIGINT)\n{ENDLESS}",
    )
    given = {"number": os.getpid(), "name": str(tmp_path / "pid")}
    with pytest.raises(KeyboardInterrupt):
        report(given, out=tmp_path / "out", notebooks=[notebook])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["endless"]
    assert [p.name for p in earlier.iterdir()] == ["status.json"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_story_is_the_first_heading_and_the_paragraph_after_it(tmp_path):
    notebook = write_notebook(tmp_path / "one.ipynb")
    assert read_story(notebook) == {"title": "The one notebook", "summary": "What it shows."}


def test_standing_alone_keeps_pictures_that_are_inside():
    inside = '<img alt="x" src="data:image/png;base64,AAAA"/>'
    assert standing_alone(inside) == inside
    assert "url(" not in standing_alone('<p style="background: url(https://example.org/x)">a</p>')
