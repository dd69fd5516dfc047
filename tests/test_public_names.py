import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moee_analysis as moee


def _declared():
    """Name and home of each public name, as a type checker reads them."""
    tree = ast.parse(Path(moee.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {alias.name: node.module for node in tree.body for alias in node.names}


DECLARED = _declared()


@pytest.mark.parametrize("name", DECLARED)
def test_a_name_that_is_declared_is_there_and_comes_from_where_it_is_said(name):
    found = getattr(moee, name)
    module = getattr(found, "__module__", found.__name__.rpartition(".")[0])
    assert module == DECLARED[name]
    assert name in dir(moee)


def test_no_other_name_is_public():
    assert {name for name in dir(moee) if not name.startswith("_")} >= set(DECLARED)
    with pytest.raises(AttributeError, match="no attribute 'extrakt'"):
        _ = moee.extrakt


def test_help_needs_no_torch():
    asked = "import sys, moee_analysis.cli as c; c.main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert "usage: moee" in done.stdout
    assert done.stdout.endswith("False\n")
