"""Processes that are killed at random moments, until what they do is done."""

from __future__ import annotations

import multiprocessing

from tests.helpers import makers, toys  # noqa: F401  imported once for all processes

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def killed_after(seconds, target, *arguments):
    """Whether a process was killed before it had finished; None for ``seconds``: it may finish."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0
