"""What programs read of a report: its summary, gates and JUnit, and what has changed."""

import copy
import json
import xml.etree.ElementTree as ET

import pytest
from bs4 import BeautifulSoup

from moee_analysis import cli
from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import choose, run_notebooks
from moee_analysis.report.runner.publish import junit
from moee_analysis.report.runner.run_notebooks import report
from moee_analysis.report.summary.gates import check_gates, read_gate, recorded
from moee_analysis.report.summary.summary import (
    compare,
    numbers_of,
    read_summary,
    summary_lines,
)
from moee_analysis.utils.environment import own_folder
from tests.helpers.notebooks import write_notebook

FINDS = """from pathlib import Path
from moee_analysis.report.notebook.bench import Bench
from moee_analysis.report.notebook.parameters import Parameters
from moee_analysis.report.notebook.results import Results
bench = Bench(Parameters(preset=preset), Results(Path(out)))
bench.results.put("parameters", {"preset": preset, "seed": 0})
bench.record("share", share)
bench.record("by_layer", {"3": number, "6": 2.5})
bench.claim("shares are large.", "so it is", share > 0.4)
bench.headline(f"of the dense top-1 kept at {number}", share, dense="90.0% top-1", form=".0%")"""
FAILS = "raise ValueError('a \\x07 bell in <the> box')"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Two notebooks of a project: one finds numbers, the other fails."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(choose, "own_folder", lambda _: folder)
    return [
        write_notebook(folder / f"{name}.ipynb", cell)
        for name, cell in {"01_found": FINDS, "02_fails": FAILS}.items()
    ]


def read(out):
    return json.loads((out / "summary.json").read_text())


def test_a_report_says_in_files_what_it_has_found(notebooks, tmp_path, monkeypatch):
    out, gates = tmp_path / "out", ["01.retention=0.5", "by_layer.6=3", "retention=0.4"]
    lines = []
    monkeypatch.setattr(run_notebooks, "tell", lines.append)
    report(out=out, notebooks=notebooks, gates=list(map(read_gate, gates)))
    summary = read(out)
    found, failed = summary["notebooks"]["01_found"], summary["notebooks"]["02_fails"]
    assert (summary["schema"], summary["preset"], summary["waiting"]) == (1, "small", [])
    assert summary["numbers"] == {"share": 0.5, "retention": 0.5}
    assert found["values"] == {
        "share": 0.5, "by_layer.3": 1, "by_layer.6": 2.5, "headline": 0.5, "retention": 0.5,
    }  # fmt: skip
    assert found["claims"] == [{"statement": "shares are large.", "verdict": True}]
    assert (found["status"], failed["status"]) == ("ok", "cell_error")
    assert [gate["met"] for gate in summary["gates"]] == [True, False, True]
    assert "✗ gate by_layer.6 of 01_found: 2.5, at least 3 is wanted" in lines
    suite = ET.parse(out / "junit.xml").getroot().find("testsuite")
    cases = {case.get("name"): case.find("failure") for case in suite}
    assert list(cases) == ["01_found", "02_fails", "01.retention >= 0.5", "by_layer.6 >= 3",
                           "retention >= 0.4"]  # fmt: skip
    assert [name for name, failure in cases.items() if failure is not None] == [
        "02_fails", "by_layer.6 >= 3",
    ]  # fmt: skip
    assert "raise ValueError" in cases["02_fails"].text
    index = BeautifulSoup((out / "index.html").read_text(), "html.parser")
    assert [item["class"] for item in index.find(class_="gates")("li")] == [
        ["good"], ["bad"], ["good"],
    ]  # fmt: skip
    # some of them anew, beside the earlier one: the other one stays, and counts no more
    report({"share": 0.3}, out=out, notebooks=notebooks[:1], against=out)
    summary = read(out)
    assert [each["earlier"] for each in summary["notebooks"].values()] == [False, True]
    assert ET.parse(out / "junit.xml").getroot().get("tests") == "1"
    assert "! 01_found: ✓ holds → ✗ does not hold: shares are large." in lines
    assert "  01_found share: 0.500 → 0.300 (-0.2)" in lines
    assert "  02_fails: only in the earlier report" in lines
    section = BeautifulSoup((out / "index.html").read_text(), "html.parser").find(class_="compared")
    assert "1 verdict changed, 0 did not." in section.get_text()
    rows = [[cell.get_text() for cell in row(["th", "td"])] for row in section.tbody("tr")]
    assert rows == [["01_found: share", "0.500", "0.300", "-0.2"],
                    ["01_found: retention", "0.500", "0.300", "-0.2"]]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code"),
    [([], 0), (["--fail-under", "retention=0.5"], 0), (["--fail-under", "share=0.6"], 3),
     (["--fail-under", "1.share=0.6", "--only", "1,2"], 1)],
)  # fmt: skip
def test_the_exit_code_tells_a_failure_from_a_number_that_is_too_small(
    notebooks, tmp_path, options, code, monkeypatch
):
    monkeypatch.setattr("moee_analysis.report.notebook.bench.check_report", lambda _: None)
    for path in notebooks:  # the command line sets the parameters that all notebooks have
        more = [
            f"{name}: str = None"
            for name in (
                "model",
                "weights",
                "calibration",
                "images",
                "img_size",
                "in_chans",
                "class_file",
            )
        ]
        lines = ["share: float = 0.5", "number: int = 1", "preset: str = ''", "out: str = None"]
        cell = FINDS if path.stem == "01_found" else FAILS
        given = "\n".join([*lines, *more, "seed: int = 0"])
        write_notebook(path, cell, parameters=given)
    assert cli.main(["report", "--out", str(tmp_path / "out"), "--only", "1", *options]) == code


def test_gates_for_what_no_notebook_records_are_refused_with_the_names_that_are_there(notebooks):
    for fine in ("share=0", "01.share=0", "01_found.by_layer.9=0", "headline=0", "retention=0"):
        check_gates([read_gate(fine)], notebooks)
    for wrong in ("02.share=0", "shares=0", "01.nix=0", "03.share=0", "01_foun.share=0"):
        with pytest.raises(MoeeError, match="01_found: by_layer, headline, retention, share"):
            check_gates([read_gate(wrong)], notebooks)
    with pytest.raises(MoeeError, match="they record none"):
        check_gates([read_gate("share=0")], notebooks[1:])


def test_every_notebook_of_the_project_has_a_headline_and_most_have_the_retention():
    names = {path.stem[:2]: set(recorded(path)) for path in own_folder("notebooks").glob("*.ipynb")}
    assert all("headline" in known for known in names.values())
    assert {"01", "05", "08"} <= {number for number, known in names.items() if "retention" in known}


@pytest.mark.parametrize(
    ("headline", "numbers"),
    [({"value": "79%", "number": 0.79245, "label": "of things"}, {"headline": 0.79245}),
     ({"value": "99%", "number": 0.992, "label": "of the dense top-1 kept"},
      {"headline": 0.992, "retention": 0.992}),
     ({"value": "none", "label": "of things"}, {}), (None, {})],
)  # fmt: skip
def test_a_headline_is_the_number_itself_not_as_it_is_written(headline, numbers):
    assert numbers_of({"headline": headline}) == numbers


OLD = {
    "schema": 1, "preset": "small", "seed": 0, "model": "bundled",
    "notebooks": {
        "a": {"status": "ok", "earlier": False, "values": {"x": 1.0, "y.z": 2.0, "gone": 3.0},
              "claims": [{"statement": "s", "verdict": True}, {"statement": "t", "verdict": None}]},
        "b": {"status": "ok", "earlier": False, "values": {}, "claims": []},
    },
}  # fmt: skip


def test_a_comparison_has_what_both_reports_have_and_says_what_one_lacks():
    new = copy.deepcopy(OLD) | {"preset": "smoke", "model": "own"}
    assert compare(OLD, OLD)["verdicts"] == compare(OLD, OLD)["missing"] == []
    new["notebooks"]["a"]["values"] = {"x": 1.5, "y.z": 1.0, "come": 1.0}
    new["notebooks"]["a"]["claims"][1]["verdict"] = False
    new["notebooks"]["c"] = new["notebooks"].pop("b")
    found = compare(OLD, new)
    assert found["numbers"] == [
        {"notebook": "a", "number": "x", "old": 1.0, "new": 1.5, "change": 0.5}
    ]
    assert found["verdicts"] == [{"notebook": "a", "statement": "t", "old": None, "new": False}]
    assert found["same"] == 1
    assert found["missing"] == ["b: only in the earlier report", "c: only in this report"]
    assert found["settings"] == ["preset small before, smoke now", "model bundled before, own now"]
    assert compare(OLD, new, waiting=["b"])["missing"] == ["c: only in this report"]
    first, *_ = summary_lines({"gates": [], "against": found})
    assert first.endswith("1 verdict changed, 1 did not")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", json.dumps(OLD | {"schema": 2}), json.dumps(OLD | {"notebooks": {"a": {}}}),
     json.dumps(OLD | {"notebooks": {"a": OLD["notebooks"]["a"] | {"values": {"x": "y"}}}})],
)  # fmt: skip
def test_an_earlier_report_that_cannot_be_read_is_refused_before_anything_runs(
    notebooks, tmp_path, content
):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text(content)
    for place in (tmp_path / "old", tmp_path / "old" / "summary.json", tmp_path / "none"):
        with pytest.raises(MoeeError):
            report(out=tmp_path / "out", notebooks=notebooks, against=place)
    assert not (tmp_path / "out").exists()
    (tmp_path / "old" / "summary.json").write_text(json.dumps(OLD))
    assert read_summary(tmp_path / "old") == OLD


def test_junit_is_xml_whatever_an_error_says():
    case = {"status": "timeout", "seconds": 2.0, "error": "a \0 <b> & \x1b", "earlier": False}
    notebooks = {"a\x01": case, "b": case | {"earlier": True}}
    text = junit({"notebooks": notebooks, "gates": [], "waiting": []}, {})
    suites = ET.fromstring(text.encode())
    [suite] = suites
    assert suite.attrib == {"name": "moee report", "tests": "1", "failures": "1", "errors": "0",
                            "skipped": "0", "time": "2.0"}  # fmt: skip
    [[failure]] = suite
    assert (failure.get("type"), failure.get("message")) == ("timeout", "a  <b> & ")
