"""The benchmarks as modules."""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT


@contextmanager
def benchmark(name):
    """The script, imported as it is when it runs: with its own folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module(name)
