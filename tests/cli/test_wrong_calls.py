"""Wrong calls: every option of every command refuses bad values in one line, at once."""

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
    "--out": NEW_FOLDERS, "atlas --out": NEW_FILES, "export --out": NEW_FILES,
    "--store": NEW_FOLDERS, "--json": NEW_FILES,
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
    "--ema": PARTS, "--held-out": PARTS, "--jobs": [*COUNTS, "1001"],
    "--for-batch": COUNTS,
    "--only": [*NAMES, "99", "0", "1_", "0x1", "01,", "01,nowhere", "01_extraction.ipynb"],
    "--against": [*FILES, "empty"],
    "--fail-under": [*NAMES, "retention", "=0.9", "retention=", "retention=x", "a=nan", "a=inf"],
    "--set": [*NAMES, "layers", "=3", "a b=3", "2=3", "layers:3", "-=1"],
} | dict.fromkeys(
    ["--recipe", "--reduce", "--noise", "--attention", "--merging", "--budget-in", "--preset",
     "--router", "--augmentation", "--precision", "--format"], CHOICES,
)  # fmt: skip
"""Values that no option of this name takes, or none of one command."""

NEEDED = {
    "extract": ["--out", "new"], "evaluate": ["run"], "finetune": ["run", "--out", "new"],
    "atlas": ["run", "--out", "new.html"], "export": ["run", "--out", "new.onnx"],
}  # fmt: skip


OTHERS = {
    ("--bogus",): "moee --help", ("bogus",): "", ("",): "", (LONG,): "", ("extrat",): "'extract'",
    ("--bogus", "extract", "--out", "new"): "", ("extract",): "--out",
    ("extract", "--out"): "--out", ("extract", "--out", "new", "x"): "",
    ("extract", "--out", "new", "--bogus"): "moee extract --help",
    ("extract", "--out", "new", "--bo\ngus"): "", ("extract", "--out", "new", "--limit", "-5"): "",
    ("evaluate",): "RUN", ("evaluate", "run", "--limit", "3"): "", ("finetune", "run"): "--out",
    ("finetune", "run", "--out", "new", "--limt", "3"): "did you mean --limit?",
    ("finetune", "run", "--out", "new", "--limit", "-5"): "--limit: expected a whole number",
    ("compare", "--systems"): "--systems", ("compare", "--macs-reduction", "0.2", "1.5"): "1.5",
    ("doctor", "run"): "", ("--version=2",): "",
}  # fmt: skip
"""Calls that are wrong in another way, and some of the words they get."""


def fill(folder):
    """One of each kind of thing."""
    (folder / "file").write_text("a file")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def calls(command, flag, about):
    """Calls that are right but for the value of one option."""
    needed = NEEDED.get(command, [])
    if about.get("action") == "store_true":
        values = ANYTHING
    else:
        values = WRONG.get(f"{command} {flag}") or WRONG[flag]
    assert len(values) >= 8
    if flag.startswith("--"):
        return [[command, *needed, f"{flag}={value}"] for value in values]
    return [[command, value, *needed[1:]] for value in values]


def check(call, words=""):
    """Fail unless a call ends with 2 and one line that says what to do."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(call)
    told = err.getvalue()
    assert stop.value.code == 2, call
    assert out.getvalue() == "", call
    assert len(told.splitlines()) == 1, (call, told)
    assert told.startswith("moee"), call
    assert "What to do: " in told, (call, told)
    assert told.endswith(".\n"), (call, told)
    assert words in told, (call, told)


def call_all():
    """Make all of these calls; no command runs, nothing is written, no heavy library comes."""
    fill(Path())
    before, parser = sorted(Path().rglob("*")), command_parser()  # one for all
    cli.command_parser = lambda: parser
    options = [
        (name, *option)
        for name, groups in COMMANDS.items()
        for group in groups.values()
        for option in group
    ]
    cli.run = pytest.fail
    for option in options:
        for call in calls(*option):
            check(call)
    for call, words in OTHERS.items():
        check(list(call), words)
    assert sorted(Path().rglob("*")) == before
    heavy = {"torch", "timm", "numpy", "pandas", "matplotlib", "sklearn", "PIL"}
    assert not heavy & sys.modules.keys()


def test_wrong_calls_are_refused_in_one_line_write_nothing_and_load_no_heavy_library(tmp_path):
    code = "from tests.cli.test_wrong_calls import call_all; call_all()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_a_wrong_call_in_a_shell_ends_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "moee_analysis", "extract", "--out", "new", "--seed", "one"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)
