"""Wrong calls: every option of every command refuses bad values in one line, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from moee_analysis import cli
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
    "--calibration": FOLDERS, "--images": FOLDERS,
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
} | dict.fromkeys(
    ["--recipe", "--reduce", "--noise", "--attention", "--preset", "--router", "--augmentation",
     "--precision"], CHOICES,
)  # fmt: skip
"""Values that no option of this name takes, or none of one command."""

NEEDED = {
    "extract": ["--out", "new"], "evaluate": ["run"], "finetune": ["run", "--out", "new"],
    "atlas": ["run", "--out", "new.html"],
}  # fmt: skip


class Place:
    """A folder to call from, with one of each kind of thing, and commands that fail if they run."""

    def __init__(self, folder, patch):
        (folder / "file").write_text("a file")
        (folder / "empty").mkdir()
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_text("{}")
        (folder / "loop").symlink_to("loop")
        os.mkfifo(folder / "pipe")
        self.folder = folder
        patch.chdir(folder)
        for name, (options, _) in COMMANDS.items():
            patch.setitem(COMMANDS, name, (options, pytest.fail))
        parser = command_parser()  # once for all calls
        patch.setattr(cli, "command_parser", lambda: parser)

    def names(self):
        return sorted(path.relative_to(self.folder) for path in self.folder.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("calls"), patch)


def calls(command, name, *, takes_value):
    """Calls that are right but for the value of one option."""
    needed = NEEDED.get(command, [])
    if not takes_value:
        return [[command, *needed, f"{name}={value}"] for value in ANYTHING]
    values = WRONG[f"{command} {name}"] if f"{command} {name}" in WRONG else WRONG[name]
    if name.startswith("--"):
        return [[command, *needed, f"{name}={value}"] for value in values]
    return [[command, value, *needed[1:]] for value in values]


OPTIONS = [
    pytest.param(command, flag, about.get("action") != "store_true", id=f"{command} {flag}")
    for command, (groups, _) in COMMANDS.items()
    for options in groups.values()
    for flag, about in options
]
OTHERS = [
    ["--bogus"], ["bogus"], [""], [LONG], ["--bogus", "extract", "--out", "new"], ["extract"],
    ["extract", "--out"], ["extract", "--out", "new", "--bogus"], ["extract", "--out", "new", "x"],
    ["extract", "--out", "new", "--bo\ngus"], ["evaluate", "run", "--limit", "3"], ["evaluate"],
    ["finetune", "run"], ["compare", "--systems"], ["compare", "--macs-reduction", "0.2", "1.5"],
    ["doctor", "run"], ["--version=2"], ["extract", "--out", "new", "--limit", "-5"],
]  # fmt: skip
"""Calls that are wrong in another way."""


def check(call):
    """Fail unless a call ends with 2 and one line that says what to do."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(call)
    told = err.getvalue()
    assert stop.value.code == 2, call
    assert out.getvalue() == ""
    assert len(told.splitlines()) == 1, told
    assert told.startswith("moee")
    assert "What to do: " in told
    assert told.endswith(".\n")


@pytest.mark.parametrize(("command", "name", "takes_value"), OPTIONS)
def test_a_bad_value_is_refused_in_one_line_and_nothing_is_written(
    place, command, name, takes_value
):
    before = place.names()
    wrong = calls(command, name, takes_value=takes_value)
    assert len(wrong) >= 8
    for call in wrong:
        check(call)
    assert place.names() == before


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: " ".join(call)[:40])
def test_a_call_that_cannot_be_read_is_refused_in_one_line(place, call):
    before = place.names()
    check(call)
    assert place.names() == before


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
        cli.main(call)
    assert told in capsys.readouterr().err


def test_it_takes_none_of_the_heavy_libraries(tmp_path):
    """A wrong call does not wait for them: all of these calls together do not."""
    code = "from tests.cli.test_wrong_calls import call_all; call_all()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)


def call_all():
    with pytest.MonkeyPatch.context() as patch:
        Place(Path(sys.argv[1]), patch)
        for parameters in OPTIONS:
            command, name, takes_value = parameters.values
            for call in calls(command, name, takes_value=takes_value):
                check(call)
        for call in OTHERS:
            check(call)
    heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "sklearn", "PIL"}
    assert not heavy & sys.modules.keys()


def test_a_wrong_call_in_a_shell_ends_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "moee_analysis", "extract", "--out", "new", "--seed", "one"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)
