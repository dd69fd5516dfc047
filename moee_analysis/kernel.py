"""Jupyter on this interpreter, whatever else is installed on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moee_analysis.paths import notebooks_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "python3"
QUIET = ["--IPKernelApp.log_level=ERROR"]


@contextmanager
def own_kernel(*, hermetic: bool = False) -> Iterator[dict[str, str]]:
    """Environment variables under which the kernel ``python3`` is this very interpreter.

    ``JUPYTER_PATH`` comes before the kernels of the user and of the system. A ``hermetic``
    kernel also reads no start-up files of the user and writes nothing into the home folder.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with TemporaryDirectory(prefix="moee-kernel-") as name:
        folder = Path(name)
        write_kernel_spec(folder / "kernels" / NAME, extra_arguments=QUIET)
        others = os.environ.get("JUPYTER_PATH")
        path = os.pathsep.join([name, others] if others else [name])
        private = {"IPYTHONDIR": f"{name}/ipython", "JUPYTER_RUNTIME_DIR": f"{name}/runtime"}
        yield {**os.environ, "JUPYTER_PATH": path, **(private if hermetic else {})}


def open_lab(options: Sequence[str] = ()) -> int:
    """Open JupyterLab on the project's notebooks, with this interpreter; return its exit code.

    ``options`` are JupyterLab's own, such as ``--no-browser``.
    """
    command = [sys.executable, "-m", "jupyterlab", str(notebooks_folder()), *options]
    with own_kernel() as environment:
        lab = subprocess.Popen(command, env=environment)
        while True:
            try:
                return lab.wait()
            except KeyboardInterrupt:  # JupyterLab hears it too, and asks whether it is meant
                continue
