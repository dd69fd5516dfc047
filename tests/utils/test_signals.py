"""Signals close what is open, and end a process with what it serves."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from moee_analysis.utils.signals import USUAL, Terminated, ended_in_order


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Those of a process that was not started by ``nohup``, or behind a shell's ``&``."""
    before = {number: signal.signal(number, handler) for number, handler in USUAL.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_closes_what_is_open_and_is_as_before_afterwards(number, code):
    closed = []

    def end():
        with ended_in_order():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # once is enough
                closed.append(True)

    with pytest.raises(Terminated) as caught:
        end()
    assert caught.value.code == code
    assert closed
    assert signal.getsignal(number) is signal.SIG_DFL


def test_handlers_of_others_and_other_threads_are_left_alone():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ended_in_order():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = []

    def use():
        with ended_in_order():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_process_ends_with_what_it_serves():
    script = (
        "import os, time; from moee_analysis.utils.signals import die_after, ended_in_order\n"
        "with ended_in_order():\n"
        "    try:\n"
        "        die_after(lambda: os.read(0, 1)); print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    printed, _ = child.communicate()  # closes its input
    assert (child.returncode, printed) == (143, "closed\n")


@pytest.mark.parametrize("number", USUAL)
def test_an_interruption_that_a_library_makes_another_error_of_is_one(number):
    def end():
        with ended_in_order():
            try:
                signal.raise_signal(number)
            except BaseException:
                raise ImportError("half a module") from None

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        end()
    with pytest.raises(ImportError), ended_in_order():
        raise ImportError
