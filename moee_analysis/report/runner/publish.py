"""What stands beside the notebooks of a report: the index, and files for programs.

``junit.xml`` is a suite of tests, one for each notebook and gate, as CI shows them.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee_analysis.report.notebook.results import STATUS, read
from moee_analysis.report.pages.site import runs_of, write_index
from moee_analysis.report.summary.gates import SUMMARY, Gate, gate_text
from moee_analysis.report.summary.summary import compare, comparison_lines, summarize
from moee_analysis.utils.storage.files import write_json, write_text

JUNIT = "junit.xml"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may have."""


@dataclass(frozen=True)
class Publisher:
    """Writes a report's front into ``out``, anew whenever one of its notebooks has ended."""

    out: Path
    parameters: Mapping[str, Any]
    gates: Sequence[Gate] = ()
    against: Mapping[str, Any] | None = None
    """The summary of an earlier report."""

    def write(self, done: Sequence[Path], waiting: Mapping[str, str]) -> dict[str, Any]:
        """Write all of it, and return the summary.

        ``done`` are the folders of the notebooks that have ended, ``waiting`` those to come.
        """
        runs, old = runs_of(self.out), self.against
        summary = summarize(runs, self.parameters, earlier=runs - set(done))
        summary["waiting"] = list(waiting)
        summary["gates"] = [gate.judge(summary["notebooks"]) for gate in self.gates]
        summary["against"] = None if old is None else compare(old, summary, waiting=waiting)
        write_json(self.out / SUMMARY, summary)
        tracebacks = {run.name: read(run / STATUS).get("traceback", "") for run in done}
        write_text(self.out / JUNIT, junit(summary, tracebacks))
        write_index(self.out, sorted(done), waiting, summary)
        return summary


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What came of the gates and of the comparison, for the terminal."""
    yield from map(gate_text, summary["gates"])
    if summary["against"]:
        yield from comparison_lines(summary["against"])


def junit(summary: Mapping[str, Any], tracebacks: Mapping[str, str]) -> str:
    """The suite of a ``summary``; ``tracebacks`` are by notebook, where there is one."""
    notebooks = {name: each for name, each in summary["notebooks"].items() if not each["earlier"]}
    failed = [each["status"] != "ok" for each in notebooks.values()]
    failed += [not gate["met"] for gate in summary["gates"]]
    seconds = sum(each["seconds"] for each in notebooks.values())
    counts = {"tests": str(len(failed)), "failures": str(sum(failed)), "time": f"{seconds:.1f}"}
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", counts, name="moee report", errors="0", skipped="0")
    for name, each in notebooks.items():
        case = _case(suite, "notebooks", name, each["seconds"])
        if each["status"] != "ok":
            _fail(case, each["status"], each["error"] or "", tracebacks.get(name, ""))
    for gate in summary["gates"]:
        case = _case(suite, "gates", f"{gate['name']} >= {gate['least']:g}", 0.0)
        if not gate["met"]:
            _fail(case, "gate", gate_text(gate))
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, kind: str, name: str, seconds: float) -> ET.Element:
    about = {"classname": f"moee.{kind}", "name": NO_XML.sub("", name), "time": f"{seconds:.1f}"}
    return ET.SubElement(suite, "testcase", about)


def _fail(case: ET.Element, kind: str, message: str, text: str = "") -> None:
    failure = ET.SubElement(case, "failure", type=kind, message=NO_XML.sub("", message))
    failure.text = NO_XML.sub("", text or message)
