"""Temporary folders become what they are named for, or vanish, also after a kill."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import tempfile

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import Terminated
from moee_analysis.utils.storage.folders import held_folder, new_folder, scratch_folder
from moee_analysis.utils.storage.locks import OURS, is_held, remove_left


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def new(final, ready=None):
    """Fill a folder; with ``ready``, until the process is killed."""
    with new_folder(final) as folder:
        (folder / "half").touch()
        if ready is not None:
            ready.set()
            signal.pause()


@pytest.fixture(scope="module")
def processes():
    return multiprocessing.get_context("fork")


def killed(processes, target, *args):
    """Kill a process when it is ready."""
    ready = processes.Event()
    process = processes.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()


def test_what_a_kill_left_goes_with_the_next_folder_of_that_name(tmp_path, processes):
    killed(processes, new, tmp_path / "run")
    (left,) = tmp_path.iterdir()
    assert OURS in left.name
    new(tmp_path / "other")
    assert left.exists()
    new(tmp_path / "run")
    assert names(tmp_path) == ["other", "run"]


def test_folders_that_are_held_or_of_others_stay(tmp_path):
    foreign = tmp_path / ".run-insiders"
    foreign.mkdir()
    with new_folder(tmp_path / "run") as first:
        assert is_held(first)
        with new_folder(tmp_path / "run") as second:
            assert first.exists()
        assert not second.exists()
    assert names(tmp_path) == [".run-insiders", "run"]


def test_an_exchange_of_folders_that_was_cut_short_is_undone(tmp_path):
    old = tmp_path / f".run{OURS}{'0' * 32}-old"
    old.mkdir()
    (old / "result").write_text("old")
    with pytest.raises(RuntimeError, match="old"), new_folder(tmp_path / "run"):
        raise RuntimeError((tmp_path / "run" / "result").read_text())
    assert names(tmp_path) == ["run"]


def test_a_disk_that_fills_up_is_told_and_leaves_the_old_folder(tmp_path):
    with new_folder(tmp_path / "run") as folder:
        (folder / "x").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with (
            pytest.raises(MoeeError, match=r"more than \d+ bytes of room for .*run'; found"),
            new_folder(tmp_path / "run") as folder,
        ):
            (folder / "x").write_text("much too long for it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "x").read_text() == "old"


def scratch(ready):
    with scratch_folder("test"):
        ready.set()
        signal.pause()


def test_scratch_goes_with_its_process_however_that_ends(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), scratch_folder("test") as folder:
        raise KeyError(folder)
    assert not names(tmp_path)
    with pytest.raises(Terminated) as caught, scratch_folder("test"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert not names(tmp_path)
    killed(processes, scratch)
    assert len(names(tmp_path)) == 1
    with scratch_folder("test"):
        assert len(names(tmp_path)) == 1
    assert not names(tmp_path)


def test_temporary_files_without_a_place_are_told(monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(MoeeError, match="set TMPDIR"), scratch_folder("test"):
        pass


def test_one_process_waits_for_another(tmp_path, processes):
    folder, found = tmp_path / "work", processes.Queue()

    def wait():
        with held_folder(folder):
            found.put(names(tmp_path))

    with held_folder(folder):
        process = processes.Process(target=wait)
        process.start()
        folder.rename(tmp_path / "done")
    process.join()
    assert found.get() == ["done", "work"]


def test_nothing_is_removed_that_somebody_holds(tmp_path):
    (tmp_path / "left").mkdir()
    with held_folder(tmp_path / "held"):
        remove_left(tmp_path, "held|left")
        assert names(tmp_path) == ["held"]
