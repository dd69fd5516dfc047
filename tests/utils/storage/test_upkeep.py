from __future__ import annotations

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
from tests.helpers.models import lively
from tests.helpers.runs import best

NAMES = {kind: f"{kind}-{number:020x}" for number, kind in enumerate(
    ("activations", "clusters", "run", "statistics", "trained")
)}  # fmt: skip


def keep(root, kind, size, about=None):
    return get_or_build(root, NAMES[kind], lambda new: (new / "x").write_bytes(bytes(size)), about)


@pytest.fixture
def store(tmp_path):
    """Five folders that another process made, the first one used last."""
    process = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for age, kind in enumerate(NAMES):
        os.utime(tmp_path / NAMES[kind], (1e9 - age, 1e9 - age))
    return tmp_path


def fill(root):
    for kind in ("activations", "clusters", "statistics", "trained"):
        keep(root, kind, 1000)
    uses = [NAMES[kind] for kind in ("activations", "clusters")]
    keep(root, "run", 1000, {"run": "a model, best", "uses": uses})


def test_a_store_is_listed_by_run_and_size(store):
    (store / "notes").mkdir()  # not ours
    found = entries(store)
    assert [entry.kind for entry in found] == list(reversed(NAMES))
    told, rest = shares(found)
    assert [(each.run.title, each.shared) for each in told] == [("a model, best", 0)]
    assert told[0].alone == sum(entry.size for entry in found) - sum(entry.size for entry in rest)
    assert {entry.kind for entry in rest} == {"statistics", "trained"}


def test_what_two_runs_use_is_told_apart(store):
    name = f"run-{7:020x}"
    get_or_build(store, name, lambda new: (new / "x").touch(),
         {"run": "another", "uses": [NAMES["activations"]]})  # fmt: skip
    told, _ = shares(entries(store))
    assert [each.run.title for each in told] == ["another", "a model, best"]
    assert all(each.shared > 1000 for each in told)


def test_what_was_not_used_for_longest_goes_first(store):
    found = entries(store)
    pruned = prune(store, sum(entry.size for entry in found[2:]))
    assert [entry.path.name for entry in pruned.removed] == [NAMES["trained"], NAMES["statistics"]]
    assert {path.name for path in store.iterdir()} == {entry.path.name for entry in found[2:]}
    assert prune(store, 10**9).removed == ()


def test_a_use_is_noted(store):
    assert present(store / NAMES["trained"])
    assert entries(store)[-1].path.name == NAMES["trained"]


def test_damaged_folders_go_first_and_foreign_ones_never(store, capsys):
    own = {
        "notes", ".config-insiders", "run-2024", ".venv-moee-analysis",
        "photos-20261129213011123456",
        "run-20261129213011123456", f".backup-{0:020x}-unfinished", f"damaged-photos-{0:020x}",
    }  # fmt: skip
    for name in own:
        (store / name).mkdir()
    damaged = store / NAMES["activations"]
    set_aside(damaged, "a test", seen=damaged.stat())
    pruned = prune(store, sum(entry.size for entry in entries(store)) - 1)
    assert [entry.kind for entry in pruned.removed] == ["damaged"]
    prune(store, 0)
    assert {path.name for path in store.iterdir()} == own


def use(root, ready):
    assert present(root / NAMES["clusters"])

    def build(_):
        ready.set()
        signal.pause()

    get_or_resume(root, f"activations-{9:020x}", build)


def test_what_a_running_process_uses_stays(store):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=use, args=(store, ready))
    process.start()
    assert ready.wait(60)
    pruned = prune(store, 0)
    unfinished = unfinished_folder(store / f"activations-{9:020x}")
    assert {path.name for path in store.iterdir()} == {NAMES["clusters"], unfinished.name}
    assert pruned.left == pruned.in_use > 0
    process.kill()
    process.join()
    assert prune(store, 0).left == 0
    assert not list(store.iterdir())


def test_a_store_that_is_not_there_holds_nothing(tmp_path):
    assert entries(tmp_path / "none") == []


def test_the_command_lists_and_prunes(store, capsys):
    assert main(["store", "--store", str(store)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "in 5 folders" in told[0]
    assert told[2].endswith("a model, best")
    assert any("statistics of experts (folders: 1)" in line for line in told)
    assert main(["store", "--store", str(store), "--prune", "2.5kB"]) == 0
    assert "removed 3 folders" in capsys.readouterr().out
    assert main(["store", "--store", str(store), "--prune", "0"]) == 0
    assert "0 bytes are left" in capsys.readouterr().out
    assert not list(store.iterdir())


def test_names_in_the_list_act_on_no_terminal(tmp_path, capsys):
    keep(tmp_path, "run", 1, {"run": "a\x1b[31mred\nmodel \u202e"})
    assert main(["store", "--store", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert r"a\x1b[31mred\nmodel \u202e" in told


def test_runs_are_listed_with_what_they_were_made_of(tmp_path):
    images = toy_images(12)
    for saved in (0.3, 0.2):
        extract(lively(), images, best(macs_reduction=saved), store=tmp_path)
    told, rest = shares(entries(tmp_path))
    assert [each.run.title for each in told] == [
        f"test_vit, best, −{saved} MACs, 12 images of noise, seed 0" for saved in ("20%", "30%")
    ]
    assert all(each.shared > each.alone for each in told)  # the tokens
    assert not rest
