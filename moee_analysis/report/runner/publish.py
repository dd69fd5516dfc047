"""What stands beside the notebooks of a report: the index, and files for programs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moee_analysis.report.notebook.results import STATUS
from moee_analysis.report.pages.site import runs_of, write_index
from moee_analysis.report.summary.comparison import compare, comparison_lines
from moee_analysis.report.summary.gates import Gate, gate_text
from moee_analysis.report.summary.junit import JUNIT, junit
from moee_analysis.report.summary.names import SUMMARY
from moee_analysis.report.summary.summary import summarize
from moee_analysis.utils.storage.files import write_json, write_text


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
        runs = runs_of(self.out)
        summary = summarize(runs, self.parameters, earlier=runs - set(done))
        summary["waiting"] = list(waiting)
        summary["gates"] = [gate.judge(summary["notebooks"]) for gate in self.gates]
        summary["against"] = None
        if self.against is not None:
            summary["against"] = compare(self.against, summary, waiting=waiting)
        write_json(self.out / SUMMARY, summary)
        write_text(self.out / JUNIT, junit(summary, {run.name: _traceback(run) for run in done}))
        write_index(self.out, sorted(done), waiting, summary)
        return summary


def _traceback(run: Path) -> str:
    return json.loads((run / STATUS).read_text(encoding="utf-8")).get("traceback", "")


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What came of the gates and of the comparison, for the terminal."""
    yield from map(gate_text, summary["gates"])
    if summary["against"]:
        yield from comparison_lines(summary["against"])
