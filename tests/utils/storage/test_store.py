from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.checksums import SEAL, damage_of
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.folders import new_folder
from moee_analysis.utils.storage.store import (
    check_writable,
    content_key,
    get_or_build,
    get_or_resume,
    present,
    set_aside,
)


def fill(folder):
    (folder / "result").write_text("made")


def fail(folder):
    fill(folder)
    raise RuntimeError("interrupted")


def test_a_complete_folder_is_found_again_without_building(tmp_path):
    first = get_or_build(tmp_path / "store", "thing", fill)
    assert (first / "result").read_text() == "made"
    assert get_or_build(tmp_path / "store", "thing", fail) == first


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_build_leaves_nothing_and_can_be_repeated(tmp_path, error):
    def build(folder):
        fill(folder)
        raise error

    with pytest.raises(error):
        get_or_build(tmp_path, "thing", build)
    assert not list(tmp_path.iterdir())
    assert (get_or_build(tmp_path, "thing", fill) / "result").exists()


def test_two_processes_may_build_the_same_thing(tmp_path):
    def build(folder):
        get_or_build(tmp_path, "thing", lambda other: (other / "result").write_text("first"))
        fill(folder)

    assert (get_or_build(tmp_path, "thing", build) / "result").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_an_older_folder_stays_until_the_new_one_is_complete(tmp_path):
    final = tmp_path / "run"
    with new_folder(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(final) as folder:
        fail(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "a"]
    with new_folder(final) as folder:
        fill(folder)
        assert (final / "a").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "result"]


def test_the_present_folder_can_be_written_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(".") as folder:
        fill(folder)
    assert (tmp_path / "here" / "result").exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeeError, match="can be written to"), new_folder(tmp_path / "file" / "run"):
        pass


def test_others_may_read_what_is_stored(tmp_path):
    folder = get_or_build(tmp_path, "thing", lambda folder: write_json(folder / "a.json", {}))
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "a.json").stat().st_mode & 0o777 == 0o644


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    for content in ({"value": float("nan")}, {"value": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, content)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_without_a_folder_is_told(tmp_path):
    with pytest.raises(MoeeError, match="a place to write"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_the_key_depends_on_every_fact_and_on_no_order():
    key = content_key(a=1, b=[2, 3])
    assert key == content_key(b=[2, 3], a=1)
    assert key != content_key(a=1, b=[3, 2])
    assert key != content_key(a=2, b=[2, 3])


def damaged(folder):
    (folder / "result").write_text("mode")  # one bit


@pytest.mark.parametrize("damage", [
    damaged, lambda folder: (folder / "result").unlink(), lambda folder: (folder / SEAL).unlink(),
    lambda folder: (folder / "strange").touch(), lambda folder: (folder / SEAL).write_text("{}"),
])  # fmt: skip
def test_what_is_damaged_is_named_set_aside_and_made_again(tmp_path, capsys, damage):
    for make in (get_or_build, get_or_resume):
        name = make.__name__
        folder = make(tmp_path, name, fill)
        damage(folder)
        assert make(tmp_path, name, fill) == folder
        assert (folder / "result").read_text() == "made"
        assert not damage_of(folder)
        told = capsys.readouterr().out
        assert f"'{folder}' is damaged" in told
        assert f"set aside as 'damaged-{name}'" in told
    assert {path.name for path in tmp_path.iterdir()} == {
        "get_or_build", "get_or_resume", "damaged-get_or_build", "damaged-get_or_resume",
    }  # fmt: skip


def test_a_disk_that_does_not_keep_what_is_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "moee_analysis.utils.storage.store.damage_of", lambda _: "result has changed"
    )
    with pytest.raises(MoeeError, match="look after that disk"):
        get_or_build(tmp_path, "thing", fill)


def test_a_store_that_is_full_is_told_and_as_before(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    get_or_build(tmp_path, "old", fill)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        for make in (get_or_build, get_or_resume):
            with pytest.raises(MoeeError, match=r"room for .*--store DIR"):
                make(tmp_path, "thing", fill)
        with pytest.raises(MoeeError, match="a store that can be written to"):
            check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_another_process_has_made_again_meanwhile_stays(tmp_path):
    folder = get_or_build(tmp_path, "thing", fill)
    seen = folder.stat()
    folder.rename(tmp_path / "old")
    get_or_build(tmp_path, "thing", fill)
    set_aside(folder, "changed", seen=seen)
    assert (folder / "result").read_text() == "made"


def test_whole_folders_in_each_others_places_are_damage(tmp_path):
    one, other = (
        get_or_build(tmp_path, name, lambda new, name=name: (new / "x").write_text(name))
        for name in "ab"
    )
    one.rename(tmp_path / "c")
    other.rename(one)
    (tmp_path / "c").rename(other)
    assert not present(one)
    assert not present(other)


@pytest.mark.parametrize("put", [
    lambda path: path.touch(), os.mkfifo, lambda path: path.symlink_to("nowhere"),
])  # fmt: skip
def test_what_is_no_folder_is_set_aside(tmp_path, put):
    for make in (get_or_build, get_or_resume):
        put(tmp_path / make.__name__)
        folder = make(tmp_path, make.__name__, fill)
        assert folder.is_dir()
        assert not folder.is_symlink()


def test_what_can_neither_be_read_nor_set_aside_is_refused(tmp_path, monkeypatch):
    folder = get_or_build(tmp_path, "thing", fill)
    damaged(folder)

    def refuse(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MoeeError, match=r"a place to write .*name another folder"):
        present(folder)
