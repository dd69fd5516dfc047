"""Wrong calls: every option of every command refuses bad values in one line, at once."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from moee_analysis.cli import main
from moee_analysis.cli.parser import COMMANDS, command_parser

LONG = "x" * 300
NUMBERS = ["", " ", "nan", "inf", "-inf", "1e999", "abc", "-1", "0x10", "1,5", LONG]
WHOLE = [*NUMBERS, "1.5", "1e3", "9" * 23, "9" * 5000]
COUNTS = [*WHOLE, "0"]
SHARES = [*NUMBERS, "0", "1.5", "28", "1e-400"]
PARTS = [*SHARES, "1"]
RATES = [*NUMBERS, "0", "1e30"]
WEIGHTS = [*NUMBERS, "1e30", "-0.1"]
NAMES = ["", " ", "\t", "a\nb", "\0", "\x1b[31m", "a\u2028b", "a\x7f", LONG]
CHOICES = [*NAMES, "worst", "none of them", "PAPER", "paper,best"]
PLACES = ["", " ", "\0", LONG, "file/x", "file/x/y", "run/" + LONG, "x/" * 3000]
NEW_FOLDERS = [*PLACES, "file", "pipe", "/dev/null", "loop", "x/" + LONG + "/y"]
NEW_FILES = [*PLACES, "run", "pipe", "missing/x", "/dev/null", ".", "/"]
FOLDERS = [*PLACES, "file", "pipe", "missing", "loop"]
FILES = [*PLACES, "run", "pipe", "missing", "loop", "/dev/null", "."]
ANYTHING = ["", "yes", "no", "0", "1", "true", "-1", "nan", LONG]

WRONG = {
    "run": [*FOLDERS, "empty", "."],
    "--out": NEW_FOLDERS, "atlas --out": NEW_FILES, "--store": NEW_FOLDERS, "--json": NEW_FILES,
    "--model": NAMES, "--systems": NAMES,
    "--weights": FILES, "--classes": FILES,
    "--calibration": FOLDERS, "--images": FOLDERS, "doctor --images": COUNTS,
    "--img-size": [*COUNTS, "100000"], "--in-chans": [*COUNTS, "100000"],
    "--limit": COUNTS, "--seeds": [*COUNTS, "1001"], "--seed": [*WHOLE, "4294967296"],
    "--macs-reduction": SHARES, "compare --macs-reduction": PARTS,
    "--params-reduction": SHARES, "--variance-kept": SHARES,
    "--memory-gb": RATES, "--disk-gb": WEIGHTS,
    "--device": [*CHOICES, "cuda:", "cuda:x", "cuda:-1", "cuda:99999", "meta", "cpu "],
    "--epochs": COUNTS, "--batch-size": COUNTS, "--accumulate": COUNTS, "--patience": COUNTS,
    "--learning-rate": RATES, "--weight-decay": WEIGHTS, "--block-weight": WEIGHTS,
    "--prune": [*NUMBERS, "20GBs", "GB", "20 gigabytes", "20gb", "1e3", "." , "20G B"],
    "--ema": PARTS, "--held-out": PARTS,
    "--dense-tokens": [*CHOICES, "cls,", ",cls", "cls,,patch", "cls patch"],
} | dict.fromkeys(
    ["--recipe", "--reduce", "--noise", "--attention", "--preset", "--router", "--augmentation",
     "--precision"], CHOICES,
)  # fmt: skip
"""Values that no option of this name takes, or none of one command."""

NEEDED = {
    "extract": ["--out", "new"], "evaluate": ["run"], "finetune": ["run", "--out", "new"],
    "atlas": ["run", "--out", "new.html"],
}  # fmt: skip


def options():
    """Every option of every command: its command, its name, and whether it takes a value."""
    for command, parser in parsers().items():
        for action in parser._actions:
            name = action.option_strings[-1] if action.option_strings else action.dest
            yield command, name, action.nargs != 0


def parsers():
    (listed,) = (a for a in command_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(listed.choices) == set(COMMANDS)
    return listed.choices


def calls(command, name, *, takes_value):
    """Calls that are right but for the value of one option."""
    needed = NEEDED.get(command, [])
    if not takes_value:
        return [[command, *needed, f"{name}={value}"] for value in ANYTHING]
    values = WRONG[f"{command} {name}"] if f"{command} {name}" in WRONG else WRONG[name]
    if name.startswith("--"):
        return [[command, *needed, f"{name}={value}"] for value in values]
    return [[command, value, *needed[1:]] for value in values]


ALL = [
    pytest.param(command, name, takes_value, id=f"{command} {name}")
    for command, name, takes_value in options()
]
OTHERS = [
    ["--bogus"], ["bogus"], [""], [LONG], ["--bogus", "extract", "--out", "new"], ["extract"],
    ["extract", "--out"], ["extract", "--out", "new", "--bogus"], ["extract", "--out", "new", "x"],
    ["extract", "--out", "new", "--bo\ngus"], ["evaluate", "run", "--limit", "3"], ["evaluate"],
    ["finetune", "run"], ["compare", "--systems"], ["compare", "--macs-reduction", "0.2", "1.5"],
    ["doctor", "run"], ["--version=2"], ["extract", "--out", "new", "--limit", "-5"],
]  # fmt: skip
"""Calls that are wrong in another way."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    return made(tmp_path, monkeypatch.chdir)


def made(folder, enter):
    """A folder to call from, with one of each kind of thing."""
    (folder / "file").write_text("a file")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    enter(folder)
    return folder


def idle():
    """The commands, which fail where they would run."""
    return {name: (add_options, pytest.fail) for name, (add_options, _) in COMMANDS.items()}


@pytest.fixture(autouse=True)
def _no_command_runs(monkeypatch):
    for name, entry in idle().items():
        monkeypatch.setitem(COMMANDS, name, entry)


def check(call):
    """Fail unless a call ends with 2 and one line that says what to do."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(call)
    told = err.getvalue()
    assert stop.value.code == 2, call
    assert out.getvalue() == ""
    assert len(told.splitlines()) == 1, told
    assert told.startswith("moee")
    assert "What to do: " in told
    assert told.endswith(".\n")


def names_in(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize(("command", "name", "takes_value"), ALL)
def test_a_bad_value_is_refused_in_one_line_and_nothing_is_written(
    place, command, name, takes_value
):
    before = names_in(place)
    wrong = calls(command, name, takes_value=takes_value)
    assert len(wrong) >= 8
    for call in wrong:
        check(call)
    assert names_in(place) == before


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: " ".join(call)[:40])
def test_a_call_that_cannot_be_read_is_refused_in_one_line(place, call):
    before = names_in(place)
    check(call)
    assert names_in(place) == before


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["finetune", "run", "--out", "new", "--limt", "3"], "did you mean --limit?"),
        (["extract", "--out", "new", "--bogus"], "moee extract --help"),
        (["--bogus"], "moee --help"),
        (["extrat"], "'extract'"),
        (["finetune", "run", "--out", "new", "--limit", "-5"], "--limit: expected a whole number"),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(place, capsys, call, told):
    with pytest.raises(SystemExit):
        main(call)
    assert told in capsys.readouterr().err


def test_it_takes_none_of_the_heavy_libraries(tmp_path):
    """A wrong call does not wait for them: all of these calls together do not."""
    code = "from tests.cli.test_wrong_calls import call_all; call_all()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)


def call_all():
    made(Path(sys.argv[1]), os.chdir)
    COMMANDS.update(idle())
    for parameters in ALL:
        command, name, takes_value = parameters.values
        for call in calls(command, name, takes_value=takes_value):
            check(call)
    for call in OTHERS:
        check(call)
    heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "sklearn", "PIL"}
    assert not heavy & sys.modules.keys()
