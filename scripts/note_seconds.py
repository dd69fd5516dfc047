"""Note in the notebooks how many seconds their cells took in a report.

``python -m scripts.note_seconds REPORT``, of a report at the preset small from an empty store, one
notebook at a time (``--jobs 1``), so that none waits for another. By these notes a first report
chooses an order, and tells how long it takes still.
"""

import json
import sys
from pathlib import Path

from moee_analysis.report.runner.choose import own_notebooks
from moee_analysis.report.runner.time_left import course_of, runs
from moee_analysis.utils.storage.files import write_text

LEAST = 1  # second that is worth a note


def note_seconds(notebook: Path, run: Path) -> None:
    """Note in a ``notebook`` what its cells took in the folder of its ``run``."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    _, *seconds = course_of(notebook, run).seconds  # without the parameters of papermill
    for cell, took in zip(filter(runs, content["cells"]), seconds, strict=True):
        cell["metadata"].pop("moee", None)
        if round(took) >= LEAST:
            cell["metadata"]["moee"] = {"seconds": round(took)}
    write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for path in own_notebooks():
        note_seconds(path, Path(sys.argv[1]) / path.stem)
