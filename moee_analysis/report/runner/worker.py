"""Runs one notebook in a process of its own, and says truthfully how it ended.

The report starts it as ``python -m moee_analysis.report.runner.worker JOB``; JOB is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from moee_analysis.outside_text import printable
from moee_analysis.report.pages.output import ESCAPES, join_streams
from moee_analysis.report.runner import jupyter as kernel
from moee_analysis.report.runner.cell_progress import note_cell
from moee_analysis.report.runner.check_parameters import literal
from moee_analysis.utils.signals import die_after
from moee_analysis.utils.storage.files import write_json

NOTEBOOK = "notebook.ipynb"
STATUS = "status.json"
KERNEL_START_SECONDS = 120
ERROR_LENGTH = 500


def run_notebook(
    notebook: Path, folder: Path, *, parameters: dict[str, Any], timeout: int, cwd: Path
) -> dict[str, Any]:
    """Execute ``notebook`` into ``folder`` and return the status.

    ``status`` is ``"ok"``, ``"cell_error"``, ``"timeout"`` or ``"dead_kernel"``; ``cell`` is
    the number in square brackets of the cell that ended the run. After a timeout or a dead
    kernel papermill's notebook calls every cell completed, so it is removed.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError

    started = time.monotonic()
    written = folder / NOTEBOOK
    status: dict[str, Any] = {"status": "ok"}
    try:
        papermill.execute_notebook(
            literal(notebook),
            literal(written),
            parameters=parameters,
            kernel_name=kernel.NAME,
            language="python",
            cwd=str(cwd),
            progress_bar=False,
            start_timeout=KERNEL_START_SECONDS,
            execution_timeout=timeout,
            shutdown_kernel="immediate",
            on_cell_executed=lambda cell, **_: join_streams(cell),  # nbclient takes hours
            on_cell_complete=lambda **_: note_cell(folder),
        )
    except papermill.PapermillExecutionError as error:
        status = _cell_error(error)
    except CellTimeoutError:
        status = _stopped("timeout", f"a cell took longer than {timeout} s", written)
    except RuntimeError as error:  # nbclient's DeadKernelError, and a kernel that never starts
        status = _stopped("dead_kernel", _death(error), written)
    return status | {"seconds": round(time.monotonic() - started, 1)}


def _cell_error(error: Any) -> dict[str, Any]:
    trace = ESCAPES.sub("", "\n".join(error.traceback))
    return {
        "status": "cell_error",
        "cell": error.exec_count,
        "error": _line(f"{error.ename}: {error.evalue}"),
        "traceback": trace,
    }


def _death(error: RuntimeError) -> str:
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, DeadKernelError):
        return "the kernel died, as it does when memory runs out"
    return f"the kernel did not start ({error})"


def _stopped(status: str, error: str, written: Path) -> dict[str, Any]:
    cell = _cells_begun(written)
    written.unlink(missing_ok=True)
    return {"status": status, "cell": cell, "error": _line(error)}


def _line(error: str) -> str:
    """The beginning of what went wrong, on one line."""
    return printable(" ".join(error.split()))[:ERROR_LENGTH]


def _cells_begun(written: Path) -> int | None:
    """How many code cells papermill had started; it notes a start time on each."""
    if not written.is_file():
        return None
    cells = json.loads(written.read_text(encoding="utf-8"))["cells"]
    begun = [c for c in cells if c["metadata"].get("papermill", {}).get("start_time")]
    return sum(c["cell_type"] == "code" for c in begun) or None


def main(text: str) -> None:
    """Do the job described by the JSON ``text`` and leave ``status.json`` in its folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    die_after(lambda: os.read(sys.stdin.fileno(), 1))  # which the report never writes to
    job = json.loads(text)
    folder = Path(job["folder"])
    status = run_notebook(
        Path(job["notebook"]),
        folder,
        parameters=job["parameters"],
        timeout=job["timeout"],
        cwd=Path(job["cwd"]),
    )
    write_json(folder / STATUS, status)


if __name__ == "__main__":
    main(sys.argv[1])
