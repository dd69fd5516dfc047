"""Notebooks side by side: how many at a time, and with how many threads each."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing

import torch

from moee_analysis.report.runner.one_notebook import Outcome, Steps
from moee_analysis.utils.environment import cores, memory

MEMORY = 2.5e9  # bytes that a notebook takes at most, on the bundled images
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
LOOK_SECONDS = 0.2  # between looks at how far the notebooks are


def usual_jobs(notebooks: int) -> int:
    """How many of so many ``notebooks`` run at a time: one for each core and :data:`MEMORY`.

    A GPU serves one at a time.
    """
    if torch.cuda.is_available():
        return 1
    return max(1, min(cores(), int(memory()[1] / MEMORY), notebooks))


def thread_limits(jobs: int) -> dict[str, str]:
    """What libraries read of the threads they may take: a share of the cores, or the user's less.

    The numbers do not depend on it, only the time.
    """

    def least(*names: str) -> str:
        given = [int(text) for text in map(os.environ.get, names) if text and text.isdigit()]
        return str(min([max(1, cores() // jobs), *filter(None, given)]))

    return {name: least(name, THREADS[0]) for name in THREADS}


def run_side_by_side(
    notebooks: Mapping[str, Steps], jobs: int, see: Callable[[str, int], None]
) -> Iterator[tuple[str, Outcome | None]]:
    """Run notebooks, by name, ``jobs`` at a time; yield each when it starts (None) and ends.

    ``see`` is told again and again how many cells of one have ended. All are in the main thread,
    where signals arrive: closing this closes them.
    """
    waiting, running = dict(notebooks), {}
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = next(iter(waiting))
                running[name] = stack.enter_context(closing(waiting.pop(name)))
                yield name, None
            for name, steps in list(running.items()):
                try:
                    see(name, next(steps))
                except StopIteration as end:
                    del running[name]
                    yield name, end.value
            time.sleep(LOOK_SECONDS)
