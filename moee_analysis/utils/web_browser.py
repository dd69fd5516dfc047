"""Opening a finished page where somebody can look at it."""

import os
import sys
import webbrowser
from pathlib import Path

from moee_analysis.utils.progress import is_headless, tell


def open_page(page: Path) -> bool:
    """Open a ``page`` in the user's browser, and say whether that was possible.

    Where there is no screen it is not tried: a browser in the terminal would take that over.
    """
    page = page.resolve()
    if has_screen() and webbrowser.open(page.as_uri()):
        return True
    tell(f"no browser to open here: {page}")
    return False


def has_screen() -> bool:
    """Whether a browser could show something: always on a desktop system, else by a display."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    desktop = sys.platform in ("win32", "darwin")
    return not is_headless() and (desktop or any(os.environ.get(name) for name in names))
