"""Where the project's own files lie, in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

from moee_analysis.errors import MoeeError

_PACKAGE = Path(__file__).resolve().parent


def data_folder() -> Path:
    """Folder of the bundled model and its model card."""
    return _own_folder("data")


def notebooks_folder() -> Path:
    """Folder of the parameterised notebooks."""
    return _own_folder("notebooks")


def store_folder() -> Path:
    """Folder of the content-keyed store: ``$MOEE_STORE``, else the user's cache folder."""
    named = os.environ.get("MOEE_STORE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "moee-analysis"


def _own_folder(name: str) -> Path:
    """``name`` beside the package (a checkout) or inside it (a wheel)."""
    candidates = (_PACKAGE.parent / name, _PACKAGE / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MoeeError(
        f"the project's own folder '{name}' beside or inside the package",
        "neither",
        "install the project again from a complete checkout",
    )
