import ast
import json
import math
import os
import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from IPython.core.inputtransformer2 import TransformerManager

from moee_analysis.report.notebook.results import NOTEBOOK
from moee_analysis.report.pages.body import SOLUTION
from moee_analysis.report.runner.choose import check_parameters, declared_parameters
from moee_analysis.report.runner.run_notebooks import report
from moee_analysis.utils import environment

NOTEBOOKS = sorted(environment.own_folder("notebooks").glob("*.ipynb"))
PARAMETERS = {
    "model": ("str", '"bundled"'),
    "weights": ("str", "None"),
    "img_size": ("int", "None"),
    "in_chans": ("int", "None"),
    "class_file": ("str", "None"),
    "calibration": ("str", "None"),
    "images": ("str", '"bundled"'),
    "layers": ("list", "[]"),
    "classes": ("list", "[]"),
    "preset": ("str", '"small"'),
    "seed": ("int", "0"),
    "out": ("str", "None"),
}
CELL_LINES = 17
ABSOLUTE = re.compile(r"(?<![\w.:/])(/(home|root|Users|tmp|work|mnt|opt|data)/|[A-Z]:\\)")
FINDING = re.compile(r"[^.]*\d.*\.", re.DOTALL)
"""A sentence or more with a number."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def _solves(cell):
    return SOLUTION in cell.metadata.get("tags", [])


def _exercises(path):
    """The number of each exercise that is asked, and the cells of its solution."""
    found, number = {}, None
    for cell in nbformat.read(path, as_version=4).cells:
        asked = re.match(r"### Exercise (\d)\. \S", cell.source)
        if asked:
            number = int(asked[1])
            found[number] = []
        elif _solves(cell):
            found.setdefault(number, []).append(cell)
        else:
            number = None
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_has_the_kernel_that_everybody_has(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.get("language_info", {"name": "python"})["name"] == "python"
    assert "widgets" not in notebook.metadata
    assert "papermill" not in notebook.metadata


@each_notebook
def test_has_no_outputs(path):
    for cell in _cells(path, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None


@each_notebook
def test_takes_the_common_parameters_in_one_cell(path):
    declared = declared_parameters(path)
    found = {n: (p["inferred_type_name"], p["default"]) for n, p in declared.items()}
    assert found == PARAMETERS
    assert all(p["help"] for p in declared.values())
    check_parameters(path, {"layers": [3], "weights": None, "seed": 1})


@each_notebook
def test_tells_and_leaves_the_computing_to_the_package(path):
    for cell in _cells(path, "code"):
        assert len(cell.source.splitlines()) <= CELL_LINES, cell.source
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        code = TransformerManager().transform_cell(cell.source)
        assert not [n for n in ast.walk(ast.parse(code)) if isinstance(n, kinds)]


@each_notebook
def test_begins_with_its_question_and_the_picture_to_expect_and_names_no_place_of_one_machine(path):
    first = _cells(path, "markdown")[0]
    assert re.match(r"# .*\?\n\n!\[.{40,}\]\(attachment:expected.png\)", first.source)
    assert len(first.attachments["expected.png"]["image/png"]) < 80_000  # in base64
    for cell in nbformat.read(path, as_version=4).cells:
        assert not ABSOLUTE.search(cell.source), cell.source


@each_notebook
def test_formulas_need_no_script_to_be_read(path):
    """The report's pages run no script: formulas are written in Unicode."""
    for cell in _cells(path, "markdown"):
        assert not re.search(r"\$[^$\n]+\$|\\\(", cell.source), cell.source


@each_notebook
def test_is_opened_under_its_own_name(path):
    opening = [c.source for c in _cells(path, "code") if "open_notebook(" in c.source]
    assert len(opening) == 1
    assert f'"{path.stem}"' in opening[0]


@each_notebook
def test_ends_in_exercises_with_solutions_that_are_hidden(path):
    found = _exercises(path)
    assert list(found) in ([1, 2], [1, 2, 3])
    for cells in found.values():
        assert len(cells) in (1, 2)
        for cell in cells:
            assert cell.cell_type == "code"
            assert cell.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}
    cells = nbformat.read(path, as_version=4).cells
    assert (_solves(cells[-2]), cells[-1].source) == (True, "bench.finish()")


@pytest.fixture(scope="session")
def made(shared_store, tmp_path_factory):
    """Run a notebook at the smoke preset, as a report of its own, when it is first asked for.

    ``MOEE_KEEP_REPORT`` is where the reports stay, for the browser tests.
    """
    kept, outcomes = os.environ.get("MOEE_KEEP_REPORT"), {}
    out = Path(kept) if kept else tmp_path_factory.mktemp("reports")

    def outcome_of(path):
        if path not in outcomes:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MOEE_STORE", str(shared_store))
                options = {"out": out / path.stem, "preset": "smoke", "notebooks": [path]}
                [outcomes[path]] = report({"seed": 1}, **options)
        return outcomes[path]

    return outcome_of


def _results(outcome):
    return json.loads((outcome.folder / "results.json").read_text())


def _numbers(value):
    """Every leaf of a JSON value that should be a number."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _numbers(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _numbers(item)]
    return [] if isinstance(value, str) else [value]


@each_notebook
def test_runs_to_its_end(path, made):
    outcome = made(path)
    assert outcome.ok, (outcome.error, (outcome.folder / "status.json").read_text())
    assert _results(outcome)["environment"]["versions"]


@each_notebook
def test_parameters_reach_the_code(path, made):
    told = _results(made(path))["parameters"]
    assert (told["seed"], told["preset"]) == (1, "smoke")


@each_notebook
def test_finds_a_headline_claims_and_finite_numbers(path, made):
    found = _results(made(path))
    assert found["headline"]["label"]
    assert found["headline"]["value"] not in (None, "")
    assert found["claims"]
    assert all(c["statement"] and c["found"] for c in found["claims"])
    numbers = _numbers(found["values"])
    assert numbers
    assert all(number is not None and math.isfinite(number) for number in numbers)


@each_notebook
def test_keeps_every_figure_and_table_it_names(path, made):
    found, folder = _results(made(path)), made(path).folder
    assert found["figures"]
    for entry in [*found["figures"].values(), *found.get("tables", {}).values()]:
        assert (folder / entry["file"]).stat().st_size > 0
    assert all(entry["caption"] for entry in found["figures"].values())


@each_notebook
def test_every_figure_says_with_numbers_what_is_to_be_seen(path, made):
    for entry in _results(made(path))["figures"].values():
        assert FINDING.fullmatch(entry["finding"]), entry
        assert entry["finding"] not in entry["caption"]


@each_notebook
def test_pictures_are_described_by_their_finding_in_solutions_too(path, made):
    executed = nbformat.read(made(path).folder / NOTEBOOK, as_version=4)
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    told = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    findings = {e["finding"] for e in _results(made(path))["figures"].values()}
    assert sum(alt.startswith(tuple(findings)) for alt in told) >= len(findings)
    assert all(FINDING.match(alt) for alt in told)
    page = BeautifulSoup((made(path).folder / "page.html").read_text(), "html.parser")
    assert [image["alt"] for image in page.find_all("img")] == told
    assert findings <= {line.get_text() for line in page.find_all(class_="finding")}


@each_notebook
def test_the_card_has_the_dense_model_beside_the_key_number(path, made):
    dense = _results(made(path))["headline"]["dense"]
    assert re.search(r"\d", dense)
    index = made(path).folder.parent / "index.html"
    page = BeautifulSoup(index.read_text(), "html.parser")
    card = page.find("a", href=f"{path.stem}/page.html").find_parent("article")
    assert card.find(class_="dense").get_text() == f"Dense: {dense}"


@each_notebook
def test_shows_each_figure_once_and_nothing_in_red(path, made):
    executed = nbformat.read(made(path).folder / NOTEBOOK, as_version=4)
    story = [o for c in executed.cells if not _solves(c) for o in c.get("outputs", [])]
    pictures = [o for o in story if "image/png" in o.get("data", {})]
    assert len(pictures) == len(_results(made(path))["figures"])
    outputs = [o for c in executed.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]


@each_notebook
def test_leaves_no_widget_behind(path, made):
    """Panels and bars are for JupyterLab: headless a reader gets figures."""
    executed = nbformat.read(made(path).folder / NOTEBOOK, as_version=4)
    shown = [o.get("data", {}) for c in executed.cells for o in c.get("outputs", [])]
    assert not [kind for data in shown for kind in data if "widget" in kind]
    assert "widgets" not in executed.metadata


@each_notebook
def test_every_solution_runs_shows_and_answers(path, made):
    for cells in _exercises(made(path).folder / NOTEBOOK).values():
        assert all(cell.execution_count for cell in cells)
        answer = cells[-1].outputs[-1]
        assert len(answer["data"]["text/markdown"].split()) > 10
        assert not re.search(r"\bnan\b", answer["data"]["text/markdown"])


@each_notebook
def test_solutions_keep_nothing_in_the_results(path):
    """What an exercise finds is no finding of the notebook."""
    solved = [c.source for c in _cells(path, "code") if _solves(c)]
    keeps = re.compile(r"bench\.(record|table|figure|show|claim|headline)\(")
    assert not [source for source in solved if keeps.search(source)]


@each_notebook
def test_the_page_folds_every_solution(path, made):
    page = BeautifulSoup((made(path).folder / "page.html").read_text(), "html.parser")
    folds = page.find_all("details")
    assert [fold.summary.get_text() for fold in folds] == ["Solution"] * len(_exercises(path))
    assert not [fold for fold in folds if fold.has_attr("open")]
    told = [fold.find_previous_sibling().get_text() for fold in folds]
    assert all(text.strip().startswith("Exercise") for text in told)
    inside = [cell for fold in folds for cell in fold.find_all(class_="code_cell")]
    assert len(inside) == sum(map(_solves, _cells(path, "code")))
