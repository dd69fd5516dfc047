"""Jupyter on this interpreter, whatever else is installed on the machine."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from moee_analysis.errors import MoeeError
from moee_analysis.utils.environment import SHIPPED, has_home, own_folder
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.folders import scratch_folder

NAME = "python3"
QUIET = ["--IPKernelApp.log_level=ERROR"]
NEWS = "@jupyterlab/apputils-extension:announcements"


@contextmanager
def own_kernel(*, hermetic: bool = False) -> Iterator[dict[str, str]]:
    """Environment variables under which the kernel ``python3`` is this very interpreter.

    A ``hermetic`` kernel also reads no start-up files of the user, writes nothing into the home
    folder, and its temporary files go when this is closed.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with scratch_folder("kernel") as folder:
        write_kernel_spec(folder / "kernels" / NAME, extra_arguments=QUIET)
        variables = os.environ | {"JUPYTER_PATH": _before("JUPYTER_PATH", str(folder))}
        if not has_home():  # Jupyter needs one
            variables["HOME"] = str(folder)
        if hermetic:
            places = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "TMPDIR": "tmp"}
            variables |= {name: str(folder / place) for name, place in places.items()}
            (folder / "tmp").mkdir()
        yield variables


def open_lab(options: Sequence[str] = ()) -> int:
    """Open JupyterLab on the project's notebooks, with this interpreter; return its exit code.

    ``options`` are JupyterLab's own, such as ``--no-browser``; they win over ours.
    """
    if find_spec("jupyterlab") is None:
        hint = "pip install jupyterlab, or read the notebooks in another editor"
        raise MoeeError(f"JupyterLab beside {sys.executable}", "none", hint)
    command = [sys.executable, "-m", "jupyterlab", *options]
    with own_kernel() as environment, _settings() as folder:
        paths = {"JUPYTER_CONFIG_PATH": _before("JUPYTER_CONFIG_PATH", folder)}
        lab = subprocess.Popen(command, env=environment | paths)
        while True:
            try:
                return lab.wait()
            except KeyboardInterrupt:  # JupyterLab hears it too, and asks whether it is meant
                continue
            except SystemExit:
                lab.terminate()
                lab.wait()
                raise


def _before(variable: str, folder: str) -> str:
    """``folder`` before those that the environment's ``variable`` lists."""
    return os.pathsep.join(filter(None, [folder, os.environ.get(variable)]))


@contextmanager
def _settings() -> Iterator[str]:
    """A folder of settings for JupyterLab: it opens the notebooks, and asks for no news."""
    notebooks = own_folder("notebooks")
    root, url = notebooks.parent, f"/lab/tree/{notebooks.name}"  # documents beside them open too
    if root.name == SHIPPED:
        root, url = notebooks, "/lab"
    with scratch_folder("lab") as folder:
        (folder / "labconfig").mkdir()
        write_json(folder / "jupyter_server_config.json", {"ServerApp": {"root_dir": str(root)}})
        write_json(folder / "jupyter_lab_config.json", {"LabApp": {"default_url": url}})
        write_json(folder / "labconfig" / "page_config.json", {"disabledExtensions": {NEWS: True}})
        yield str(folder)
