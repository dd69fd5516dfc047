"""How a process is ended from outside, so that whatever is temporary goes with it."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = ("SIGTERM", "SIGHUP")


class Terminated(SystemExit):
    """The process was asked to end by a signal; its code is what a shell expects then, as 143."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While open, SIGTERM ends this process by :class:`Terminated`, which closes what is open.

    So does SIGHUP, of a terminal that is closed. Without effect outside the main thread, and where
    a program has handlers of its own, or ignores the signals as under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    named = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    ours = [number for number in named if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, _end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what is open closes in peace
    raise Terminated(128 + number)


def die_with_parent() -> None:
    """End this process, as by SIGTERM, when its standard input is closed: its parent has died."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    sys.stdin.buffer.read()
    signal.raise_signal(signal.SIGTERM)
