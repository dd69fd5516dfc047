import io
import json
import re
import signal
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup

from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import one_notebook, run_notebooks
from moee_analysis.report.runner.choose import check_parameters
from moee_analysis.report.runner.run_notebooks import report
from tests.helpers.notebooks import write_notebook

KEEPS_A_PICTURE = """import io, json, os, pathlib
from PIL import Image
folder = pathlib.Path(out)
(folder / "figures").mkdir()
Image.new("RGB", (40, 30), "teal").save(folder / "figures" / "one.png")
one = {"file": "figures/one.png", "finding": "All 1200 pixels are teal.", "caption": "a <teal> one"}
claims = [{"statement": "s", "found": "f", "holds": True, "verdict": "✓ holds"}]
found = {"figures": {"one": one}, "claims": claims, "values": {"number": number}}
(folder / "results.json").write_text(json.dumps(found))"""
REMOTE = """from IPython.display import HTML, Javascript
display(Javascript("alert(1)"))
HTML('<img src="https://example.org/a.png"><script src="https://example.org/a.js"></script>'
     '<style>@import url(https://example.org/a.css);</style><p onclick="x()">kept</p>')"""
NOTEBOOKS = {
    "fine": [
        "md:![far](https://example.org/far.png) <script src='https://example.org/b.js'></script>",
        KEEPS_A_PICTURE,
        REMOTE,
        "md:### Exercise 1. How many are twice as many?",
        "solution:twice = 2 * number",
        "solution:print(f'{twice} are twice as many')",
        "import sys; print(sys.executable, number, share, layers, out)",
    ],
    "error": ["print('before')", "raise ValueError('the <cell> failed')", "print('after')"],
    "slow": ["print('before')", "while True: pass"],
    "killed": [KEEPS_A_PICTURE, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
}


FRONT = ("index.html", "junit.xml", "summary.json")


class Screen(io.StringIO):
    """A terminal that remembers what it showed."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report, on a terminal, of notebooks that end in every way a notebook can end."""
    folder = tmp_path_factory.mktemp("with {braces} and spaces")
    paths = [write_notebook(folder / f"{name}.ipynb", *cells) for name, cells in NOTEBOOKS.items()]
    nameless = nbformat.read(paths[0], as_version=4)
    del nameless.metadata["kernelspec"]  # a notebook that names no kernel runs too
    nbformat.write(nameless, paths[0])
    lines, given = [], {"number": 7, "share": 1, "layers": [3, 4]}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOEE_HEADLESS", raising=False)
        patch.setattr(sys, "stderr", Screen())
        patch.setitem(run_notebooks.CELL_SECONDS, "smoke", 2)
        patch.setattr(run_notebooks, "tell", lines.append)
        outcomes = report(given, out=folder / "out", preset="smoke", notebooks=paths, jobs=2)
        lines.append(sys.stderr.getvalue())
    return folder / "out", {outcome.notebook: outcome for outcome in outcomes}, lines


def status_of(out, name):
    return json.loads((out / name / "status.json").read_text())


def test_every_ending_is_told_apart(made):
    out, outcomes, _ = made
    # papermill adds one cell with the injected parameters before the notebook's own
    expected = {"fine": ("ok", None), "error": ("cell_error", 4), "slow": ("timeout", 4),
                "killed": ("dead_kernel", 4)}  # fmt: skip
    for name, (status, cell) in expected.items():
        written, outcome = status_of(out, name), outcomes[name]
        assert written["status"] == outcome.status == status
        assert written.get("cell") == outcome.cell == cell
        assert outcome.ok == (status == "ok")
        text = (outcome.folder / "page.html").read_text()
        complete = status in ("ok", "cell_error")  # after other endings none may look complete
        assert [path.name for path in (out / name).glob("*.ipynb")] == ["notebook.ipynb"] * complete
        assert ('class="banner"' in text) == (status != "ok")
    # an error is named, and what was kept before a kernel died is shown
    assert outcomes["error"].error == "ValueError: the <cell> failed"
    assert "raise ValueError" in status_of(out, "error")["traceback"]
    page = (out / "error" / "page.html").read_text()
    assert "ValueError: the &lt;cell&gt; failed" in page
    assert "Execution using papermill" not in page
    page = (out / "killed" / "page.html").read_text()
    assert "Kept before it stopped" in page
    assert 'alt="All 1200 pixels are teal. a &lt;teal&gt; one"' in page
    assert (out / "killed" / "results.json").is_file()


def test_parameters_reach_the_notebook_and_the_kernel_is_this_interpreter(made):
    out, _, _ = made
    executed = nbformat.read(out / "fine" / "notebook.ipynb", as_version=4)
    printed = executed.cells[-1].outputs[0].text
    assert printed.startswith(f"{sys.executable} 7 1 [3, 4] ")
    assert json.loads((out / "fine" / "results.json").read_text())["values"] == {"number": 7}
    papermill = executed.metadata.papermill  # it names the report's folder, not the temporary one
    assert papermill.parameters["out"] == str(out / "fine")
    assert papermill.input_path == "fine.ipynb"


def test_the_terminal_hears_of_every_start_and_end_and_nothing_but_the_report_is_left(made):
    out, _, (*lines, screen) = made
    assert sorted(p.name for p in out.iterdir()) == sorted([*NOTEBOOKS, *FRONT])
    assert not [path for path in out.glob("*/*") if path.name.startswith(".")]
    assert all(re.fullmatch(r"\w+: started", line) for line in lines[:2])
    text = "\n".join(lines)
    assert re.search(r"^\[[1-4]/4\] fine: ok after \d+ s(, about [\d:]+ left)?$", text, re.M)
    assert re.search(
        r"^\[[1-4]/4\] error: cell error after \d+ s in cell 4: ValueError", text, re.M
    )
    assert lines[-1] == f"report: {out / 'index.html'}"
    assert re.search(r"(fine|error|slow|killed) \d/\d +\d+%", screen)
    assert screen.endswith("\r")  # the bar is gone


@pytest.mark.parametrize("page", ["index.html", *(f"{name}/page.html" for name in NOTEBOOKS)])
def test_pages_stand_alone(made, page):
    text = (made[0] / page).read_text()
    soup = BeautifulSoup(text, "html.parser")
    assert not soup(["script", "iframe", "object", "embed", "link", "base"])
    for name in ("src", "srcset", "poster", "data"):
        sources = [tag[name] for tag in soup.find_all(attrs={name: True})]
        assert all(source.startswith("data:") for source in sources)
    assert not [name for tag in soup.find_all() for name in tag.attrs if name.startswith("on")]
    assert not [style for style in soup("style") if re.search(r"@import|url\(", style.get_text())]
    assert "default-src 'none'" in text


def test_a_page_keeps_what_is_harmless_and_folds_solutions_and_the_index_has_a_card_for_each(made):
    page = BeautifulSoup((made[0] / "fine" / "page.html").read_text(), "html.parser")
    assert page.find("p", string="kept")
    assert page.find("a", href="https://example.org/far.png").get_text() == "far"
    assert page.h1.get_text() == "The fine notebook"
    fold = page.find("details")
    assert not fold.has_attr("open")
    assert "twice = 2 * number" in fold.get_text()
    assert "14 are twice as many" in fold.get_text()
    assert "Exercise" in fold.find_previous_sibling().get_text()
    index = BeautifulSoup((made[0] / "index.html").read_text(), "html.parser")
    links = {card.a["href"]: card.a.get_text() for card in index("article", class_="card")}
    assert links == {f"{name}/page.html": f"The {name} notebook" for name in NOTEBOOKS}
    assert "What it shows." in index.article.get_text()  # without the marks of Markdown
    words = " ".join(index.get_text().split())
    assert "1 of 4 notebooks ran to their end. Of 2 claims of the papers, 2 hold here." in words
    assert index.img["src"].startswith("data:image/webp;base64,")
    assert index.img["alt"] == "All 1200 pixels are teal. a <teal> one"


@pytest.mark.parametrize(
    ("parameters", "options", "match"),
    [({"numbr": 2}, {}, "'numbr'"), ({"out": "somewhere"}, {}, "'out' as an argument"),
     *(({"number": wrong}, {}, "'number' to be int") for wrong in ("2", True, 2.0, None)),
     *(({"share": wrong}, {}, "'share' to be float") for wrong in ("0.5", float("nan"))),
     ({"name": Path("a")}, {}, "'name' to be str"),
     *(({"layers": n}, {}, "'layers' to be list") for n in ((3, 4), [Path("a")], [(3, 4)])),
     ({}, {"preset": "smok"}, "smoke, small, full"),
     ({}, {"notebooks": []}, "at least one notebook"),
     *(({}, {"jobs": wrong}, "jobs as a whole number") for wrong in (0, 1.5, "2")),
     ({}, {"notebooks": ["a.ipynb", "b/a.ipynb"]}, "'a' twice"),
     ({}, {"notebooks": ["missing.ipynb"]}, "a notebook"),
     *(({}, {"notebooks": [name]}, "the path of a notebook, in UTF-8")
       for name in ("caf\udce9.ipynb", "caf\udce9/a.ipynb", "a\0b.ipynb", 5))],
)  # fmt: skip
def test_a_wrong_call_is_refused_before_anything_runs(tmp_path, parameters, options, match):
    notebook = write_notebook(tmp_path / "one.ipynb", "1 / 0")
    with pytest.raises(MoeeError, match=match):
        report(parameters, **{"out": tmp_path / "out", "notebooks": [notebook], **options})
    assert not (tmp_path / "out").exists()
    check_parameters(notebook, {"folder": None, "share": 1})  # as it says
    (tmp_path / "place" / "one").mkdir(parents=True)  # of other things, no earlier report
    with pytest.raises(MoeeError, match="free or an earlier report"):
        report(out=tmp_path / "place", notebooks=[notebook])


@pytest.mark.parametrize(
    ("parameters", "match"),
    [("n: int | None = None\npreset: str = 'a'\nout: str = None", "n written otherwise"),
     ("s: str = 'a=b'\npreset: str = 'a'\nout: str = None", "s written otherwise"),
     ("preset: str = 'a'", "a parameter 'out'"),
     ("preset: str = ", "Python in the parameters cell")],
)  # fmt: skip
def test_a_parameters_cell_that_papermill_misreads_is_refused(tmp_path, parameters, match):
    notebook = write_notebook(tmp_path / "one.ipynb", parameters=parameters)
    with pytest.raises(MoeeError, match=match):
        check_parameters(notebook, {})


@pytest.mark.parametrize(
    "spoil",
    [lambda notebook: notebook.clear(),
     lambda notebook: notebook["metadata"].update(kernelspec=5),
     lambda notebook: notebook["metadata"]["kernelspec"].pop("display_name"),
     lambda notebook: notebook["cells"][1].pop("source"),
     lambda notebook: notebook["cells"][1]["metadata"].update(tags=5)],
)  # fmt: skip
def test_a_notebook_that_breaks_the_format_is_refused_before_anything_runs(tmp_path, spoil):
    path = write_notebook(tmp_path / "bad.ipynb", "1 / 0")
    notebook = json.loads(path.read_text())
    spoil(notebook)
    path.write_text(json.dumps(notebook) if notebook else "not JSON")
    with pytest.raises(MoeeError, match=r"a notebook at .*found Not[A-Za-z]+: "):
        report(out=tmp_path / "out", notebooks=[path])
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_the_earlier_page_no_process_and_nothing_half_written(tmp_path, monkeypatch):
    """It is pressed while two workers are at notebooks that never end."""
    earlier = tmp_path / "out" / "endless"
    earlier.mkdir(parents=True)
    (earlier / "status.json").write_text("{}")
    names = ("endless", "other")
    notebooks = [write_notebook(tmp_path / f"{n}.ipynb", "while True: pass") for n in names]
    looked = []

    def press(folder):
        if looked.append(folder) or len({*looked}) == 2:
            signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(one_notebook, "count_ended_cells", press)
    # a shell tells what it starts in the background to ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        report(out=tmp_path / "out", notebooks=notebooks, jobs=2)
    signal.signal(signal.SIGINT, before)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"endless", "index.html", "junit.xml", "summary.json"}
    assert '<failure type="waiting"' in (tmp_path / "out" / "junit.xml").read_text()
    assert [p.name for p in earlier.iterdir()] == ["status.json"]
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [command for command in commands if "runner.worker" in command]
