"""How a process is ended from outside, so that whatever is temporary goes with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

SIGNALS = ("SIGTERM", "SIGHUP")
PATIENCE = 15  # seconds, for a process to end in order


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


def die_after(wait: Callable[[], object]) -> None:
    """End this process, as by SIGTERM, when ``wait`` returns: what it serves is no longer there."""
    threading.Thread(target=_die_after, args=(wait,), daemon=True).start()


def _die_after(wait: Callable[[], object]) -> None:
    wait()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)
