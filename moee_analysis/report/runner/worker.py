"""Runs one notebook in a process of its own, and says truthfully how it ended.

The report starts it as ``python -m moee_analysis.report.runner.worker JOB``; JOB is JSON. In the
report's own process nbclient would take its handlers of signals; and nobody would end the kernel
of a report that was killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from moee_analysis.outside_text import printable
from moee_analysis.report.pages.output import ESCAPES, join_streams
from moee_analysis.report.runner.jupyter import NAME
from moee_analysis.utils.signals import die_after
from moee_analysis.utils.storage.files import write_json

KERNEL_START_SECONDS = 120
ERROR_LENGTH = 500


def run_notebook(job: dict[str, Any]) -> dict[str, Any]:
    """Execute a notebook and return the status.

    ``status`` is ``"ok"``, ``"cell_error"``, ``"timeout"`` or ``"dead_kernel"``; ``cell`` is
    the number in square brackets of the cell that ended the run.
    """
    begun, written = time.monotonic(), Path(job["written"])
    status: dict[str, Any] = {"status": "ok"}
    try:
        papermill.execute_notebook(
            # papermill takes braces for the fields of a format string
            *(job[name].replace("{", "{{").replace("}", "}}") for name in ("notebook", "written")),
            parameters=job["parameters"],
            kernel_name=NAME,
            language="python",
            progress_bar=False,
            start_timeout=KERNEL_START_SECONDS,
            execution_timeout=job["timeout"],
            shutdown_kernel="immediate",
            on_cell_executed=lambda cell, **_: _end_cell(cell, Path(job["cells"])),
        )
    except papermill.PapermillExecutionError as error:
        status = {
            "status": "cell_error",
            "cell": error.exec_count,
            "error": _one_line(f"{error.ename}: {error.evalue}"),
            "traceback": ESCAPES.sub("", "\n".join(error.traceback)),
        }
    except CellTimeoutError:
        status = _stop(written, "timeout", f"a cell took longer than {job['timeout']} s")
    except DeadKernelError:
        status = _stop(written, "dead_kernel", "the kernel died, as it does when memory runs out")
    except RuntimeError as error:
        status = _stop(written, "dead_kernel", f"the kernel did not start ({error})")
    return status | {"seconds": round(time.monotonic() - begun, 1)}


def _end_cell(cell: NotebookNode, notes: Path) -> None:
    """Join the outputs of a code cell that has ended, and note that it has, for the report."""
    join_streams(cell)  # nbclient would take hours
    with notes.open("ab") as file:
        file.write(b".")


def _stop(written: Path, status: str, error: str) -> dict[str, Any]:
    """The status of a run that was ended in the last cell that has begun."""
    begun = 0
    if written.is_file():
        cells = json.loads(written.read_text(encoding="utf-8"))["cells"]
        code = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
        begun = sum(bool(times.get("start_time")) for times in code)
        written.unlink()  # papermill calls every cell in it completed
    return {"status": status, "cell": begun or None, "error": _one_line(error)}


def _one_line(error: str) -> str:
    return printable(" ".join(error.split()))[:ERROR_LENGTH]


def main(text: str) -> None:
    """Do the job described by the JSON ``text`` and write its status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    die_after(lambda: os.read(sys.stdin.fileno(), 1))  # which the report never writes to
    job = json.loads(text)
    write_json(Path(job["status"]), run_notebook(job))


if __name__ == "__main__":
    main(sys.argv[1])
