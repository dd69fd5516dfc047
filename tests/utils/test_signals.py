from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from moee_analysis.utils.signals import Terminated, ended_in_order, undisturbed

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Those of a process that was not started by ``nohup``, or behind a shell's ``&``."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
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


def test_handlers_of_others_stay():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_in_order():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_are_left_alone():
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
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert child.stdout.readline() == "ready\n"
    told, _ = child.communicate()  # closes its input
    assert (child.returncode, told) == (143, "closed\n")


def test_an_interruption_that_a_library_makes_another_error_of_is_one():
    def ended_by(number):
        with ended_in_order():
            try:
                signal.raise_signal(number)
            except BaseException:
                raise ImportError("half a module") from None

    with pytest.raises(KeyboardInterrupt):
        ended_by(signal.SIGINT)
    with pytest.raises(Terminated):
        ended_by(signal.SIGTERM)
    with pytest.raises(ImportError), ended_in_order():
        raise ImportError


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_steps_that_belong_together_are_not_parted(number):
    done = []

    def work():
        with ended_in_order(), undisturbed():
            with undisturbed():
                signal.raise_signal(number)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
        work()
    assert done
