"""A store is listed by run and size, and pruned; folders in use and foreign ones stay."""

import multiprocessing
import os
import signal

import pytest

from moee_analysis.cli import main
from moee_analysis.extraction.pipeline import extract
from moee_analysis.utils.storage.store import (
    get_or_build,
    get_or_resume,
    present,
    set_aside,
    unfinished_folder,
)
from moee_analysis.utils.storage.upkeep import entries, prune, shares
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.helpers.runs import best

FORK = multiprocessing.get_context("fork")
KINDS = ("activations", "clusters", "run", "statistics", "trained")
NAMES = {kind: f"{kind}-{number:020x}" for number, kind in enumerate(KINDS)}
UNFINISHED = f"activations-{9:020x}"


def build(root, name, about=None):
    return get_or_build(root, name, lambda new: (new / "x").write_bytes(bytes(1000)), about)


def run_in_process(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def fill(root):
    for kind in ("activations", "clusters", "statistics", "trained"):
        build(root, NAMES[kind])
    uses = [NAMES[kind] for kind in ("activations", "clusters")]
    build(root, NAMES["run"], {"run": "a model, best", "uses": uses})


@pytest.fixture
def store(tmp_path):
    """Five folders that another process made, the first one used last."""
    process = run_in_process(fill, tmp_path)
    process.join()
    assert process.exitcode == 0
    for age, kind in enumerate(KINDS):
        os.utime(tmp_path / NAMES[kind], (1e9 - age, 1e9 - age))
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_store_is_listed_by_run_and_size(store):
    (store / "notes").mkdir()  # not ours
    found = entries(store)
    assert [entry.kind for entry in found] == list(reversed(KINDS))
    ((run, alone, shared),), rest = shares(found)
    assert (run.title, shared) == ("a model, best", 0)
    assert alone == sum(entry.size for entry in found) - sum(entry.size for entry in rest)
    assert {entry.kind for entry in rest} == {"statistics", "trained"}
    build(store, f"run-{7:020x}", {"run": "another", "uses": [NAMES["activations"]]})
    runs, _ = shares(entries(store))
    assert [run.title for run, _, _ in runs] == ["another", "a model, best"]
    assert all(shared > 1000 for _, _, shared in runs)
    assert entries(store / "none") == []


def test_what_was_not_used_for_longest_goes_first(store):
    found = entries(store)
    removed, _, _ = prune(store, sum(entry.size for entry in found[2:]))
    assert [entry.path.name for entry in removed] == [NAMES["trained"], NAMES["statistics"]]
    assert names(store) == {entry.path.name for entry in found[2:]}
    assert prune(store, 10**9)[0] == []
    assert present(store / NAMES["run"])
    assert entries(store)[-1].kind == "run"


def test_damaged_folders_go_first_and_foreign_ones_never(store):
    own = {
        "notes", ".config-insiders", "run-2024", ".venv-moee-analysis",
        "photos-20261129213011123456", "run-20261129213011123456", f".backup-{0:020x}-unfinished",
        f"damaged-photos-{0:020x}",
    }  # fmt: skip
    for name in own:
        (store / name).mkdir()
    damaged = store / NAMES["activations"]
    set_aside(damaged, "a test", seen=damaged.stat())
    removed, _, _ = prune(store, sum(entry.size for entry in entries(store)) - 1)
    assert [entry.kind for entry in removed] == ["damaged"]
    prune(store, 0)
    assert names(store) == own


def use(root, ready):
    def wait(folder):
        (folder / "x").write_bytes(bytes(10))
        ready.set()
        signal.pause()

    assert present(root / NAMES["clusters"])
    get_or_resume(root, UNFINISHED, wait)


def test_what_a_running_process_uses_stays(store):
    ready = FORK.Event()
    process = run_in_process(use, store, ready)
    assert ready.wait(60)
    _, left, in_use = prune(store, 0)
    assert names(store) == {NAMES["clusters"], unfinished_folder(store / UNFINISHED).name}
    assert left == in_use > 0
    process.kill()
    process.join()
    assert prune(store, 0)[1] == 0
    assert not names(store)


def test_the_command_lists_and_prunes(store, capsys):
    assert main(["store", "--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "in 5 folders" in lines[0]
    assert lines[2].endswith("a model, best")
    assert any("statistics of experts (folders: 1)" in line for line in lines)
    assert main(["store", "--store", str(store), "--prune", "2.5kB"]) == 0
    assert "removed 3 folders" in capsys.readouterr().out
    build(store, f"run-{7:020x}", {"run": "a\x1b[31mred\nmodel \u202e"})
    assert main(["store", "--store", str(store)]) == 0
    assert r"a\x1b[31mred\nmodel \u202e" in capsys.readouterr().out
    present(store / NAMES["run"])
    assert main(["store", "--store", str(store), "--prune", "0"]) == 0
    assert "are left" in capsys.readouterr().out


def test_runs_are_listed_with_what_they_were_made_of(tmp_path):
    for saved in (0.3, 0.2):
        extract(toy_vit(depth=2), toy_images(12), best(macs_reduction=saved), store=tmp_path)
    runs, rest = shares(entries(tmp_path))
    assert [run.title for run, _, _ in runs] == [
        f"toy, best, −{saved} MACs, 12 images of noise, seed 0" for saved in ("20%", "30%")
    ]
    assert all(shared > alone for _, alone, shared in runs)  # the tokens
    assert not rest
