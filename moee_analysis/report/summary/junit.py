"""``junit.xml``: a report as a suite of tests, one for each notebook and gate, as CI shows them."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from moee_analysis.report.summary.gates import gate_text

JUNIT = "junit.xml"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may have."""


def junit(summary: Mapping[str, Any], tracebacks: Mapping[str, str]) -> str:
    """The suite of a ``summary``; ``tracebacks`` are by notebook, where there is one."""
    suite = ET.Element("testsuite", name="moee report")
    for name, each in summary["notebooks"].items():
        if not each["earlier"]:
            case = _case(suite, "notebooks", name, each["seconds"])
            if each["status"] != "ok":
                _fail(case, each["status"], each["error"] or "", tracebacks.get(name, ""))
    for gate in summary["gates"]:
        case = _case(suite, "gates", f"{gate['name']} >= {gate['least']:g}", 0.0)
        if not gate["met"]:
            _fail(case, "gate", gate_text(gate))
    cases = suite.findall("testcase")
    counts = {
        "tests": str(len(cases)), "failures": str(len(suite.findall("testcase/failure"))),
        "errors": "0", "skipped": "0",
        "time": f"{sum(float(case.attrib['time']) for case in cases):.1f}",
    }  # fmt: skip
    suite.attrib |= counts
    suites = ET.Element(
        "testsuites", {name: counts[name] for name in ("tests", "failures", "time")}
    )
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, kind: str, name: str, seconds: float) -> ET.Element:
    about = {"classname": f"moee.{kind}", "name": NO_XML.sub("", name), "time": f"{seconds:.1f}"}
    return ET.SubElement(suite, "testcase", about)


def _fail(case: ET.Element, kind: str, message: str, text: str = "") -> None:
    failure = ET.SubElement(case, "failure", type=kind, message=NO_XML.sub("", message))
    failure.text = NO_XML.sub("", text or message)
