"""Where the project's own files lie, in a checkout and in an installed package; and the store."""

import os
from contextlib import suppress
from pathlib import Path

from moee_analysis.errors import MoeeError

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "shipped"  # in a wheel, beside the rooms


def data_folder() -> Path:
    """Folder of the bundled model and its model card."""
    return _own_folder("data")


def notebooks_folder() -> Path:
    """Folder of the parameterised notebooks."""
    return _own_folder("notebooks")


def _own_folder(name: str) -> Path:
    for folder in (_PACKAGE.parent / name, _PACKAGE / SHIPPED / name):
        if folder.is_dir():
            return folder
    raise MoeeError(
        f"the project's own folder '{name}' beside or inside the package",
        "neither",
        "install the project again from a complete checkout",
    )


def store_folder() -> Path:
    """Folder of the content-keyed store: ``$MOEE_STORE``, else in the user's cache folder."""
    named, cache = os.environ.get("MOEE_STORE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named).expanduser() if named else Path(cache).expanduser() / "moee-analysis"
    except RuntimeError as error:
        raise MoeeError(
            "a place for the store", f"no home folder ({error})",
            "set MOEE_STORE to a folder that can be written to",
        ) from None  # fmt: skip


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest existing one of the folders that it is in."""
    return next(place for place in (path, *path.absolute().parents) if _exists(place))


def _exists(path: Path) -> bool:
    with suppress(OSError):  # a name that is too long, a folder that may not be looked into
        return path.exists()
    return False
