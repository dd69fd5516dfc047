"""The store: folders that are complete or absent, made again where they are damaged."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.checksums import SEAL, damage_of
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import (
    BUILDING,
    check_writable,
    content_key,
    get_or_build,
    get_or_resume,
    present,
    set_aside,
)
from tests.helpers.processes import small_disk

BOTH = pytest.mark.parametrize("get", [get_or_build, get_or_resume])


def fill(folder):
    (folder / "result").write_text("made")


def raising(error, name="half"):
    """A build that stops with a file half written."""

    def build(folder):
        (folder / name).touch()
        raise error

    return build


def damage(folder):
    (folder / "result").write_text("mode")  # one bit


def replaced(put):
    """A damage: something else in the place of a folder."""

    def harm(folder):
        shutil.rmtree(folder)
        put(folder)

    return harm


def names(folder):
    return {path.name for path in folder.iterdir()}


@BOTH
def test_a_complete_folder_is_found_again_without_building(tmp_path, get):
    first = get(tmp_path / "store", "thing", fill)
    assert (first / "result").read_text() == "made"
    assert get(tmp_path / "store", "thing", raising(RuntimeError)) == first


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_build_leaves_nothing_and_can_be_repeated(tmp_path, error):
    with pytest.raises(error):
        get_or_build(tmp_path, "thing", raising(error))
    assert not names(tmp_path)
    folder = get_or_build(tmp_path, "thing", lambda folder: write_json(folder / "result", {}))
    assert folder.stat().st_mode & 0o777 == 0o755  # others may read it
    assert (folder / "result").stat().st_mode & 0o777 == 0o644


def test_what_a_kill_has_left_of_a_build_is_no_part_of_the_next(tmp_path):
    left = tmp_path / f".thing{BUILDING}"
    get_or_build(tmp_path, "other", fill)
    left.mkdir()
    (left / "half").touch()
    assert names(get_or_build(tmp_path, "thing", fill)) == {"result", SEAL}
    assert names(tmp_path) == {"other", "thing"}


def test_of_several_that_want_the_same_thing_one_builds_it(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        fill(folder)

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: get_or_build(tmp_path, "thing", build), range(4)))
    assert found == {tmp_path / "thing"}
    assert len(built) == 1
    assert names(tmp_path) == {"thing"}


def test_what_a_build_refuses_is_removed_but_what_stops_it_is_resumed(tmp_path):
    with pytest.raises(MoeeError):
        get_or_resume(tmp_path, "thing", raising(MoeeError("a", "b", "c")))
    assert not names(tmp_path)
    for name in ("half", ".progress.json-cut"):
        with pytest.raises(KeyboardInterrupt):
            get_or_resume(tmp_path, "thing", raising(KeyboardInterrupt, name))
    found = []
    get_or_resume(tmp_path, "thing", lambda folder: found.extend(names(folder)))
    assert found == ["half"]
    assert names(tmp_path) == {"thing"}
    assert names(tmp_path / "thing") == {"half", SEAL}


def test_the_key_depends_on_every_fact_and_on_no_order():
    key = content_key(a=1, b=[2, 3])
    assert key == content_key(b=[2, 3], a=1)
    assert key not in (content_key(a=1, b=[3, 2]), content_key(a=2, b=[2, 3]))


@BOTH
@pytest.mark.parametrize("harm", [
    damage, lambda folder: (folder / "result").unlink(), lambda folder: (folder / SEAL).unlink(),
    lambda folder: (folder / "strange").touch(), lambda folder: (folder / SEAL).write_text("{}"),
    *map(replaced, (Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere"))),
])  # fmt: skip
def test_what_is_damaged_is_named_set_aside_and_made_again(tmp_path, capsys, get, harm):
    folder = get(tmp_path, "thing", fill)
    harm(folder)
    assert get(tmp_path, "thing", fill) == folder
    assert (folder / "result").read_text() == "made"
    assert not folder.is_symlink()
    assert not damage_of(folder)
    printed = capsys.readouterr().out
    assert f"'{folder}' is damaged" in printed
    assert "set aside as 'damaged-thing'" in printed
    assert names(tmp_path) == {"thing", "damaged-thing"}


def test_a_disk_that_does_not_keep_what_is_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("moee_analysis.utils.storage.store.damage_of", lambda _: "it has changed")
    with pytest.raises(MoeeError, match="look after that disk"):
        get_or_build(tmp_path, "thing", fill)


@BOTH
def test_a_store_that_is_full_is_told_and_as_before(tmp_path, get):
    get_or_build(tmp_path, "old", fill)
    with small_disk(3):
        with pytest.raises(MoeeError, match=r"room for .*--store DIR"):
            get(tmp_path, "thing", fill)
        with pytest.raises(MoeeError, match="a store that can be written to"):
            check_writable(tmp_path)
    assert names(tmp_path) == {"old"}


def test_what_another_process_has_made_again_meanwhile_stays(tmp_path):
    folder = get_or_build(tmp_path, "thing", fill)
    seen = folder.stat()
    folder.rename(tmp_path / "old")
    get_or_build(tmp_path, "thing", fill)
    set_aside(folder, "changed", seen=seen)
    assert (folder / "result").read_text() == "made"


def test_whole_folders_in_each_others_places_are_damage(tmp_path):
    one, other = (get_or_build(tmp_path, name, fill) for name in "ab")
    one.rename(tmp_path / "c")
    other.rename(one)
    (tmp_path / "c").rename(other)
    assert not present(one)
    assert not present(other)


def test_what_can_neither_be_read_nor_set_aside_is_refused(tmp_path, monkeypatch):
    folder = get_or_build(tmp_path, "thing", fill)
    damage(folder)

    def refuse(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MoeeError, match=r"a place to write .*name another folder"):
        present(folder)
