"""What stands beside the notebooks of a report: the index, and files for programs.

``junit.xml`` is a suite of tests, one for each notebook and gate, as CI shows them.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moee_analysis.report.notebook.results import STATUS, read
from moee_analysis.report.pages.site import runs_of, write_index
from moee_analysis.report.runner.one_notebook import Settings
from moee_analysis.report.summary.gates import SUMMARY, gate_text
from moee_analysis.report.summary.summary import compare, summarize
from moee_analysis.utils.storage.files import write_json, write_text

JUNIT = "junit.xml"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may have."""


def publish(settings: Settings, done: Sequence[Path], waiting: Mapping[str, str]) -> dict[str, Any]:
    """Write a report's front, at its start and whenever a notebook has ended; return the summary.

    ``done`` are the folders of the notebooks that have ended, ``waiting`` those to come.
    """
    out, against = settings.out, settings.against
    runs = runs_of(out)
    summary = summarize(runs, settings.parameters, earlier=runs - set(done))
    summary["waiting"] = list(waiting)
    summary["gates"] = [gate.judge(summary["notebooks"]) for gate in settings.gates]
    summary["against"] = None if against is None else compare(against, summary, waiting=waiting)
    write_json(out / SUMMARY, summary)
    tracebacks = {run.name: read(run / STATUS).get("traceback", "") for run in done}
    write_text(out / JUNIT, junit(summary, tracebacks))
    write_index(out, sorted(done), waiting, summary)
    return summary


def junit(summary: Mapping[str, Any], tracebacks: Mapping[str, str]) -> str:
    """The suite of a ``summary``; ``tracebacks`` are by notebook, where there is one."""
    notebooks = {name: each for name, each in summary["notebooks"].items() if not each["earlier"]}
    failed = [each["status"] != "ok" for each in notebooks.values()]
    failed += [True] * len(summary["waiting"])
    failed += [not gate["met"] for gate in summary["gates"]]
    seconds = sum(each["seconds"] for each in notebooks.values())
    counts = {"tests": str(len(failed)), "failures": str(sum(failed)), "time": f"{seconds:.1f}"}
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", counts, name="moee report", errors="0", skipped="0")
    for name, each in notebooks.items():
        case = _case(suite, "notebooks", name, each["seconds"])
        if each["status"] != "ok":
            _fail(case, each["status"], each["error"] or "", tracebacks.get(name, ""))
    for name in summary["waiting"]:  # an interrupted report is no green one
        _fail(_case(suite, "notebooks", name, 0.0), "waiting", "it has not ended")
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
