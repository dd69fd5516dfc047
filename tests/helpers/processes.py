"""Functions and commands as processes of their own, which start quickly and may be killed."""

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

PRELOADED = [__name__, "moee_analysis.cli.commands", "tests.helpers.ranks"]


@cache
def processes():
    """Context of processes for which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=len, args=("",))  # which waits until all is imported
    first.start()
    first.join()
    return context


def start(target, *arguments):
    """A process that does something."""
    process = processes().Process(target=target, args=arguments)
    process.start()
    return process


def ended_at(step, number, target, *arguments):
    """Exit code of a process that sends itself a signal before it flushes for that many times."""
    process = start(_end_at, step, number, target, arguments)
    process.join()
    return process.exitcode


def _end_at(step, number, target, arguments):
    flushes, flush = itertools.count(1), os.fsync

    def fsync(handle):
        if next(flushes) == step:
            os.kill(os.getpid(), number)
        flush(handle)

    os.fsync = fsync
    target(*arguments)


def new_place(folder):
    """A folder for one process, with temporary files of its own."""
    (folder / "tmp").mkdir(parents=True)
    return folder


def begin(place):
    """Print into a file, keep temporary files apart, and hear signals, also below ``nohup``."""
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    tempfile.tempdir = str(place / "tmp")
    with (place / "printed").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_command(argv, place, largest=None):
    """Run a command; no file may have more than the ``largest`` number of bytes."""
    from moee_analysis.cli import main

    begin(place)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    sys.exit(main(argv))


def make_inputs(folder):
    """Weights of a small model, and a few pictures."""
    from safetensors.torch import save_file

    from tests.helpers.images import image_folder
    from tests.helpers.models import lively

    save_file(lively().state_dict(), folder / "weights.safetensors")
    image_folder(folder / "images", {"ant": 8, "bee": 8})
    return folder


def extraction(inputs, out, store=None):
    """Arguments of an extraction that takes two seconds."""
    own = [] if store is None else ["--store", str(store)]
    return ["extract", "--model", "test_vit", "--weights", str(inputs / "weights.safetensors"),
            "--recipe", "best", "--calibration", str(inputs / "images"),
            "--macs-reduction", "0.28", "--out", str(out), *own]  # fmt: skip


def finetuning(inputs, run, out):
    """Arguments of a fine-tuning that takes two seconds."""
    return ["finetune", str(run), "--images", str(inputs / "images"), "--epochs", "3",
            "--batch-size", "4", "--out", str(out)]  # fmt: skip


@contextmanager
def small_disk(largest):
    """No file may have more bytes than ``largest``, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def benchmark(name):
    """A script of ``benchmarks/``, imported as it is when it runs: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module(name)
