"""Where the project's own files lie, in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

from moee_analysis.errors import MoeeError

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "shipped"  # what a wheel has beside its rooms


def data_folder() -> Path:
    """Folder of the bundled model and its model card."""
    return _own_folder("data")


def notebooks_folder() -> Path:
    """Folder of the parameterised notebooks."""
    return _own_folder("notebooks")


def store_folder() -> Path:
    """Folder of the content-keyed store: ``$MOEE_STORE``, else the user's cache folder.

    Raises
    ------
    MoeeError
        Neither is known: a user without a home.
    """
    named, cache = os.environ.get("MOEE_STORE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser()
        return Path(cache or "~/.cache").expanduser() / "moee-analysis"
    except RuntimeError as error:
        raise MoeeError(
            "a place for the store", f"no home folder ({error})",
            "set MOEE_STORE to a folder that can be written to",
        ) from None  # fmt: skip


def _own_folder(name: str) -> Path:
    """``name`` beside the package (a checkout) or inside it (a wheel)."""
    candidates = (_PACKAGE.parent / name, _PACKAGE / SHIPPED / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MoeeError(
        f"the project's own folder '{name}' beside or inside the package",
        "neither",
        "install the project again from a complete checkout",
    )
