"""What a person sees: bars that move, or a few lines in a log; lines; a page in the browser."""

import io
import math
import os
import sys
import webbrowser
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm.std import tqdm

from moee_analysis.outside_text import printable
from moee_analysis.utils.distributed import rank

T = TypeVar("T")

SHORT = 3.0  # seconds that a log has nothing to say about
LOGGED = {"bar_format": "{desc}: {n_fmt}/{total_fmt}, {remaining} left", "position": 0,
          "leave": False, "mininterval": 0, "maxinterval": math.inf}  # fmt: skip

_UNWATCHED: ContextVar[bool] = ContextVar("unwatched", default=False)


def is_headless() -> bool:
    """Whether nobody is watching: ``MOEE_HEADLESS=1`` (as in reports), or :func:`unwatched`."""
    return _UNWATCHED.get() or os.environ.get("MOEE_HEADLESS") == "1"


@contextmanager
def unwatched() -> Iterator[None]:
    """While open, nothing is said of progress: for a job of many that have a bar in common."""
    before = _UNWATCHED.set(True)
    try:
        yield
    finally:
        _UNWATCHED.reset(before)


def tell(line: str) -> None:
    """Print a line, once for all processes; bars make room for it."""
    _print(line, sys.stdout)


def tell_progress(line: str) -> None:
    """Print a line for whoever is watching, apart from what a program finds."""
    if not is_headless():
        _print(line, sys.stdout if is_in_notebook() else sys.stderr)


def _print(line: str, file: TextIO) -> None:
    if rank() == 0:
        with tqdm.external_write_mode():
            print(printable(line), file=file, flush=True)


def progress(
    items: Iterable[T], *, label: str, total: int | None = None, delay: float = 0.0
) -> Iterator[T]:
    """Yield ``items`` and say how far along we are, and how much time is left.

    A terminal and a notebook get a text bar, after a ``delay`` in seconds, a headless notebook
    nothing, a plain log one line per tenth of what takes longer than :data:`SHORT`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if is_headless() or rank() > 0:
        return iter(items)
    look = {"delay": delay, "leave": None}
    if is_in_notebook():  # no widget, which would need its kernel later
        look |= {"file": sys.stdout, "ascii": False, "ncols": 80, "leave": False}
    elif not has_bars():
        tenth = math.ceil(total / 10) if total else math.inf
        look = LOGGED | {"file": Log(), "delay": SHORT, "miniters": tenth}
    return iter(tqdm(items, desc=label, total=total, **look))


class Log(io.StringIO):
    """What bars write, as lines of a log."""

    def write(self, text: str) -> int:
        """Print the ``text``, if there is any."""
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


def has_bars() -> bool:
    """Whether a person watches a terminal in which bars can move."""
    return not is_headless() and rank() == 0 and sys.stderr.isatty()


def is_in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and shell.config.get("IPKernelApp") is not None


def open_page(page: Path) -> bool:
    """Open a ``page`` in the user's browser, and say whether that was possible."""
    page = page.resolve()
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # else one may open in the terminal
    has_screen = sys.platform in ("win32", "darwin") or any(map(os.environ.get, displays))
    if has_screen and not is_headless() and webbrowser.open(page.as_uri()):
        return True
    tell(f"no browser to open here: {page}")
    return False
