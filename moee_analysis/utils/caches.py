"""Caches of the libraries, on machines where they have no home: read-only, or without a user name.

numba (behind UMAP) refuses to start without a cache, Jupyter without a home, and PyTorch's compiler
without a user name. They are found one before they are imported, if they have none.
"""

import getpass
import os
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from moee_analysis.errors import MoeeError
from moee_analysis.utils.paths import nearest_folder

NUMBA, MATPLOTLIB = "NUMBA_CACHE_DIR", "MPLCONFIGDIR"


def prepare_caches() -> None:
    """Give libraries that cannot write their usual caches a private folder of the temporary one.

    Variables that are set already stay as they are.
    """
    with suppress(OSError):  # no temporary folder either: `moee doctor` and the caches say so
        if _in_home(".") is None:  # Jupyter asks where it is
            os.environ["HOME"] = str(_private_folder())
        if NUMBA not in os.environ and not _numba_has_place():
            os.environ[NUMBA] = str(_private_folder() / "numba")
        if MATPLOTLIB not in os.environ and not _writable(_in_home(".config")):
            os.environ[MATPLOTLIB] = str(_private_folder() / "matplotlib")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # as of `docker run --user 1234`
        os.environ["USER"] = f"user{os.getuid()}"


def check_numba_cache() -> str:
    """Return where numba keeps its compiled code, without which it would not start, nor UMAP."""
    named = os.environ.get(NUMBA)
    if named and _writable(Path(named)):
        return named
    if not named and _numba_has_place():
        return "beside the libraries, or in the home folder"
    raise MoeeError(
        "a cache for numba, which UMAP needs",
        f"none to write to ({named or 'no home'})",
        f"set {NUMBA} to a folder that can be written to, or cluster with --reduce pca",
    )


def has_home() -> bool:
    """Whether the user has a home folder that can be written to."""
    return _writable(_in_home("."))


def _numba_has_place() -> bool:
    """Whether numba can write beside the code that it compiles, or into the user's cache."""
    spec = find_spec("umap")
    beside = Path(spec.origin).parent / "__pycache__" if spec and spec.origin else None
    cache = os.environ.get("XDG_CACHE_HOME")
    return _writable(beside) or _writable(Path(cache) if cache else _in_home(".cache"))


def _in_home(name: str) -> Path | None:
    with suppress(RuntimeError):  # nobody knows where it is
        return Path.home() / name
    return None


def _writable(folder: Path | None) -> bool:
    """Whether ``folder`` can be written to, or made."""
    there = folder and nearest_folder(folder)
    return bool(there) and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """A folder for this user alone: others could put code into a cache that they can write to."""
    folder = Path(tempfile.gettempdir()) / f"moee-analysis-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not folder.is_symlink():
        return folder
    return Path(tempfile.mkdtemp(prefix="moee-analysis-"))
