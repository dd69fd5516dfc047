"""Commands on a disk that is full: one line, the old result, and nothing half-written."""

import shutil

import pytest

from tests.helpers.images import contents
from tests.helpers.processes import (
    extraction,
    finetuning,
    make_inputs,
    new_place,
    run_command,
    start,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs, a run, and the store it was made in."""
    folder = make_inputs(tmp_path_factory.mktemp("made"))
    argv = extraction(folder, folder / "run", folder / "store")
    assert done(argv, new_place(folder / "place")) == 0
    return folder


def done(argv, place, largest=None):
    """The exit code of a command that can write no file of more than so many bytes."""
    process = start(run_command, argv, place, largest)
    process.join()
    return process.exitcode


def atlas(made, out):
    return ["atlas", str(made / "run"), "--images", str(made / "images"), "--out", str(out)]


def evaluation(made, out):
    return ["evaluate", str(made / "run"), "--json", str(out)]


CASES = {
    "store": (lambda made, place: extraction(made, place / "out", place / "new"), 70_000),
    "temporary files": (lambda made, place: extraction(made, place / "out"), 70_000),
    "run": (lambda made, place: extraction(made, place / "out", made / "store"), 70_000),
    "atlas": (lambda made, place: atlas(made, place / "out"), 70_000),
    "fine-tuning": (lambda made, place: finetuning(made, made / "run", place / "tuned"), 70_000),
    "numbers": (lambda made, place: evaluation(made, place / "out"), 1000),
}


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_told_in_one_line_and_leaves_the_old_result(made, tmp_path, name):
    arguments, largest = CASES[name]
    place = new_place(tmp_path / "place")
    if name in ("store", "temporary files", "run"):
        shutil.copytree(made / "run", place / "out")
    elif name != "fine-tuning":
        (place / "out").write_text("old")
    before = contents(made / "run")
    assert done(arguments(made, place), place, largest) == 2
    printed = (place / "printed").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("moee")]
    assert line == printed.splitlines()[-1]
    assert "free" in line
    assert str(place) in line
    assert "What to do: make room" in line
    assert "Traceback" not in printed
    names = {path.name for path in place.rglob("*") if "store" not in path.parts}
    assert not [each for each in names if each.startswith(".") or "-moee-" in each]
    assert not list((place / "tmp").iterdir())
    assert contents(made / "run") == before
    if (place / "out").is_dir():
        assert contents(place / "out") == before
    elif name != "fine-tuning":
        assert (place / "out").read_text() == "old"
