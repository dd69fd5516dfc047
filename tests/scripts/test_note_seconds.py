"""What notebooks say of their cells' seconds."""

import json

from moee_analysis.report.runner.time_left import course_of
from scripts.note_seconds import note_seconds
from tests.helpers.notebooks import write_notebook


def test_seconds_of_a_report_are_noted_in_the_notebook_and_nothing_else_changes(tmp_path):
    path = write_notebook(tmp_path / "one.ipynb", "md:# Words", "1 + 1", "2 + 2", "")
    before = json.loads(path.read_text())
    cells = [cell for cell in before["cells"] if cell["cell_type"] == "code" and cell["source"]]
    took = [0.0, 0.1, 7.6, 0.3]  # the second one is papermill's
    ran = [
        cell | {"metadata": {"papermill": {"duration": seconds}}}
        for cell, seconds in zip([cells[0], *cells], took, strict=True)
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notebook.ipynb").write_text(json.dumps(before | {"cells": ran}))
    for _ in range(2):
        note_seconds(path, tmp_path / "run")
    after = json.loads(path.read_text())
    assert [c["metadata"].pop("moee", None) for c in after["cells"]].count({"seconds": 8}) == 1
    assert after == before
    assert course_of(path, tmp_path / "none").seconds == [0, 0, 8, 0]
