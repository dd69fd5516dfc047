"""Temporary folders become what they are named for, or vanish, also after a kill."""

import multiprocessing
import signal
import tempfile

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import Terminated
from moee_analysis.utils.storage.folders import held_folder, new_folder, scratch_folder
from moee_analysis.utils.storage.locks import OURS, is_held, remove_left, temporary
from tests.helpers.images import contents
from tests.helpers.processes import small_disk

FORK = multiprocessing.get_context("fork")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_within(folder):
    """Kill a process that has opened a folder."""
    ready = FORK.Event()

    def wait():
        with folder as place:
            (place / "half").touch()
            ready.set()
            signal.pause()

    process = FORK.Process(target=wait)
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()


def fill(final, text="new"):
    with new_folder(final) as folder:
        (folder / "x").write_text(text)


def fail(folder):
    (folder / "y").write_text("half")
    raise RuntimeError


def test_an_older_folder_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill("run", "old")
    with pytest.raises(RuntimeError), new_folder("run") as folder:
        fail(folder)
    with (
        small_disk(10),
        pytest.raises(MoeeError, match=r"more than \d+ bytes of room for .*run'; found"),
    ):
        fill("run", "much too long for it")
    assert names(tmp_path) == ["run"]
    assert contents(tmp_path / "run") == {"x": b"old"}
    fill("run")
    monkeypatch.chdir("run")
    fill(".", "newer")  # the present folder
    assert contents(tmp_path / "run") == {"x": b"newer"}
    with pytest.raises(MoeeError, match="can be written to"):
        fill(tmp_path / "run" / "x" / "below a file")


def test_what_came_meanwhile_stays_where_nothing_is_to_be_replaced(tmp_path):
    with (
        pytest.raises(MoeeError, match="not empty"),
        new_folder(tmp_path / "run", replace=False),
    ):
        fill(tmp_path / "run", "meanwhile")
    assert contents(tmp_path / "run") == {"x": b"meanwhile"}
    assert names(tmp_path) == ["run"]


def test_what_a_kill_left_goes_with_the_next_folder_of_that_name(tmp_path):
    kill_within(new_folder(tmp_path / "run"))
    (left,) = tmp_path.iterdir()
    assert OURS in left.name
    fill(tmp_path / "other")
    assert left.exists()
    fill(tmp_path / "run")
    assert names(tmp_path) == ["other", "run"]


def test_folders_that_are_held_or_of_others_stay(tmp_path):
    (tmp_path / ".run-insiders").mkdir()
    with new_folder(tmp_path / "run") as first:
        assert is_held(first)
        with new_folder(tmp_path / "run") as second:
            assert first.exists()
        assert not second.exists()
    assert names(tmp_path) == [".run-insiders", "run"]
    (tmp_path / "left").mkdir()
    with held_folder(tmp_path / "held"):
        remove_left(tmp_path, "held|left")
        assert names(tmp_path) == [".run-insiders", "held", "run"]


def test_an_exchange_of_folders_that_was_cut_short_is_undone(tmp_path):
    old = tmp_path / f".run{OURS}{'0' * 32}-old"
    old.mkdir()
    (old / "result").write_text("old")
    with pytest.raises(RuntimeError, match="old"), new_folder(tmp_path / "run"):
        raise RuntimeError((tmp_path / "run" / "result").read_text())
    assert names(tmp_path) == ["run"]


def test_scratch_goes_with_its_process_however_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), scratch_folder("test") as folder:
        raise KeyError(folder)
    assert not names(tmp_path)
    with pytest.raises(Terminated) as caught, scratch_folder("test"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert not names(tmp_path)
    kill_within(scratch_folder("test"))
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


def test_one_process_waits_for_another(tmp_path):
    folder, held, found = tmp_path / "work", FORK.Event(), FORK.Queue()

    def wait():
        held.wait()
        with held_folder(folder):
            found.put(names(tmp_path))

    process = FORK.Process(target=wait)
    process.start()  # before the folder is held: a fork would hold it too
    with held_folder(folder):
        held.set()
        folder.rename(tmp_path / "done")
    process.join()
    assert found.get() == ["done", "work"]


def test_a_folder_that_another_process_took_for_one_that_was_left_is_made_again(tmp_path):
    made = []

    def make(path):
        path.mkdir()
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    with temporary(tmp_path / "x-", make) as folder:
        assert made[1:] == [folder]
        assert is_held(folder)
    assert not names(tmp_path)
