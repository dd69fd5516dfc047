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

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 15  # seconds, for a process to end in order

_WAITING: list[int] = []
"""The first signal that came in each of the sections that are undisturbed, 0 for none."""


class Terminated(SystemExit):
    """The process was asked to end by a signal; its code is what a shell expects then, as 143."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While open, SIGTERM ends this process by :class:`Terminated`, which closes what is open.

    So does SIGHUP, of a terminal that is closed. These and Ctrl-C end it also where a library makes
    another error of them. Without effect outside the main thread, and where
    a program has handlers of its own, or ignores the signals as under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # once is enough: what is open closes in peace
        if _WAITING:
            _WAITING[-1] = _WAITING[-1] or number
        else:
            raise _ending_by(number)

    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    ours = {number: was for number, was in usual.items() if signal.getsignal(number) is was}
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    except Exception:
        if not asked:
            raise
        # a library has made an error of its own of the interruption
        raise _ending_by(asked[0]) from None
    finally:
        for number, was in ours.items():
            signal.signal(number, was)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While open, what would end this process in order waits: for steps that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _WAITING.append(0)
    try:
        yield
    finally:
        number = _WAITING.pop()
    if number and _WAITING:
        _WAITING[-1] = _WAITING[-1] or number
    elif number:
        raise _ending_by(number)


def _ending_by(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)


def die_after(wait: Callable[[], object]) -> None:
    """End this process, as by SIGTERM, when ``wait`` returns: what it serves is no longer there."""
    threading.Thread(target=_die_after, args=(wait,), daemon=True).start()


def _die_after(wait: Callable[[], object]) -> None:
    wait()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(128 + signal.SIGTERM)
