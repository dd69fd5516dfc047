"""How a process is ended from outside, so that its temporary files and folders go with it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

USUAL = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
PATIENCE = 15  # seconds, for a process to end in order


class Terminated(SystemExit):
    """The process was asked to end by a signal; its code is what a shell expects then, as 143."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP end this process by :class:`Terminated`, which closes all.

    Without effect outside the main thread, where a program has own handlers, and under ``nohup``.
    """
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # once is enough: what is open closes in peace
        raise _ending_by(number)

    is_main = threading.current_thread() is threading.main_thread()
    ours = {n: usual for n, usual in USUAL.items() if is_main and signal.getsignal(n) is usual}
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    except Exception:
        if not received:
            raise
        raise _ending_by(received[0]) from None  # a library made another error of it
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)


def _ending_by(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)


def die_after(wait: Callable[[], object]) -> None:
    """End this process, as by SIGTERM, when ``wait`` returns: what it serves is no longer there."""

    def end() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
