"""Where this runs: the project's own folders, the store, versions, caches of the libraries.

On some machines the home is read-only, or the user has no name. numba (behind UMAP) refuses to
start without a cache, Jupyter without a home, and PyTorch's compiler without a user name.
"""

import getpass
import hashlib
import os
import platform
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from moee_analysis.errors import MoeeError

PACKAGE = "moee-analysis"
LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "hdbscan", "umap-learn",
    "matplotlib", "seaborn", "papermill",
)  # fmt: skip
SHIPPED = "shipped"  # in a wheel, beside the rooms
CGROUPS = Path("/sys/fs/cgroup")  # what a container may take
NUMBA, MATPLOTLIB = "NUMBA_CACHE_DIR", "MPLCONFIGDIR"
_ROOMS = Path(__file__).resolve().parents[1]


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that make the numbers."""
    found = {PACKAGE: version(PACKAGE), "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES}


def version(distribution: str = PACKAGE) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def code_version(*rooms: str) -> str:
    """Hash of the package's code, whatever its version is called; of some rooms, or of all."""
    folders = [_ROOMS / room for room in rooms] or [_ROOMS]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()


def describe_device(device: str) -> str:
    """``device`` in words a reader of the report understands."""
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def describe_machine(device: str) -> list[str | int]:
    """What decides how long something takes on ``device``."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return [describe_device(device), capability, torch.get_num_threads(), version("torch")]


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use, and those of them that are free."""
    whole = psutil.virtual_memory()
    files = (CGROUPS / "memory.max", CGROUPS / "memory" / "memory.limit_in_bytes")
    texts = [file.read_text().strip() for file in files if file.is_file()]
    limits = [int(text) for text in texts if text.isdigit()]
    return min([whole.total, *limits]), min([whole.available, *limits])


def own_folder(name: str) -> Path:
    """Folder of the project: "data" of the bundled models and their cards, or "notebooks"."""
    for folder in (_ROOMS.parent / name, _ROOMS / SHIPPED / name):
        if folder.is_dir():
            return folder
    expected = f"the project's own folder '{name}' beside or inside the package"
    raise MoeeError(expected, "neither", "install the project again from a complete checkout")


def store_folder() -> Path:
    """Folder of the content-keyed store: ``$MOEE_STORE``, else in the user's cache folder."""
    named, cache = os.environ.get("MOEE_STORE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named or f"{cache}/{PACKAGE}").expanduser()
    except RuntimeError as error:
        hint = "set MOEE_STORE to a folder that can be written to"
        raise MoeeError("a place for the store", f"no home folder ({error})", hint) from None


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest existing one of the folders that it is in."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):  # a name that is too long, a folder that may not be looked into
            if place.exists():
                return place
    return Path("/")


def prepare_caches() -> None:
    """Give libraries that cannot write their usual caches a private one, unless they are told."""
    with suppress(OSError):  # no temporary folder either: `moee doctor` and the caches say so
        if _in_home(".") is None:  # Jupyter asks where it is
            os.environ["HOME"] = str(_private_folder())
        if NUMBA not in os.environ and not _is_writable(_user_cache()):
            os.environ[NUMBA] = str(_private_folder() / "numba")
        if MATPLOTLIB not in os.environ and not _is_writable(_in_home(".config")):
            os.environ[MATPLOTLIB] = str(_private_folder() / "matplotlib")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # as of `docker run --user 1234`
        os.environ["USER"] = f"user{os.getuid()}"


def spare_cores() -> None:
    """In a notebook, let threads that wait sleep: those that spin slow down whatever else runs."""
    if "ipykernel" in sys.modules:  # before torch is imported, when OpenMP reads it
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def check_numba_cache() -> str:
    """Return where numba keeps its compiled code, without which it would not start, nor UMAP."""
    named = os.environ.get(NUMBA)
    if _is_writable(Path(named) if named else _user_cache()):
        return named or "beside the libraries, or in the home folder"
    found = f"none to write to ({named or 'no home'})"
    hint = f"set {NUMBA} to a folder that can be written to, or cluster with --reduce pca"
    raise MoeeError("a cache for numba, which UMAP needs", found, hint)


def has_home() -> bool:
    """Whether the user has a home folder that can be written to."""
    return _is_writable(_in_home("."))


def _user_cache() -> Path | None:
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache) if cache else _in_home(".cache")


def _in_home(name: str) -> Path | None:
    with suppress(RuntimeError):  # nobody knows where it is
        return Path.home() / name
    return None


def _is_writable(folder: Path | None) -> bool:
    there = folder and nearest_folder(folder)  # it may have to be made
    return bool(there) and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """A folder for this user alone: others could put code into a cache that they can write to."""
    folder = Path(tempfile.gettempdir()) / f"{PACKAGE}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not folder.is_symlink():
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{PACKAGE}-"))
