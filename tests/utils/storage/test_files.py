"""Files are read whole or refused, and appear complete or not at all."""

import errno
import json
import os
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage import files
from moee_analysis.utils.storage.files import (
    LARGEST_TEXT,
    new_file,
    read_json,
    read_text,
    write_json,
    write_text,
)
from moee_analysis.utils.storage.locks import OURS
from moee_analysis.utils.storage.refusals import bytes_text, check_place, writing
from tests.helpers.images import contents
from tests.helpers.processes import small_disk


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def test_a_text_that_is_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "vast.json").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    with pytest.raises(MoeeError, match="268 MB in"):
        read_text(tmp_path / "vast.json", expected="a text")


@pytest.mark.parametrize(("put", "found"), [
    (lambda path: None, "no such file"), (lambda path: path.mkdir(), "a folder"),
    (os.mkfifo, "a named pipe"), (put_socket, "a socket"),
    (lambda path: path.symlink_to("/dev/zero"), "a device"),
    (lambda path: path.symlink_to(path), "no such file"),
])  # fmt: skip
def test_what_is_no_file_is_told_and_never_waited_for(tmp_path, put, found, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    put(tmp_path / "x")
    for read in (read_text, read_json, files.check_file):
        with pytest.raises(MoeeError, match=found):
            read(tmp_path / "x", expected="a list")


@pytest.mark.parametrize(("content", "found"), [
    (b"", "complete JSON"), (b'{"a": [1, 2', "complete JSON"), (b"\xff\xfe", "no text"),
    (b'{"a": NaN}', "NaN"), (b"[-Infinity]", "Infinity"), (b"[" * 200_000, "recursion"),
    (b"1" * 10_000, "complete JSON"),
])  # fmt: skip
def test_json_that_is_none_is_refused(tmp_path, content, found):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(MoeeError, match=found):
        read_json(tmp_path / "x.json", expected="numbers")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    (tmp_path / "x").touch(0o000)
    with pytest.raises(MoeeError, match="cannot be read"):
        read_text(tmp_path / "x", expected="a number")


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"a": 1})
    for wrong in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": wrong})
    with pytest.raises(UnicodeEncodeError), new_file(path) as new:
        new.write_text("half a caf\udce9")
    assert {name: json.loads(c) for name, c in contents(tmp_path).items()} == {path.name: {"a": 1}}
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_a_killed_process_left_goes_with_the_next_file_but_nothing_else(tmp_path):
    left = tmp_path / f".x{OURS}{'0' * 32}"
    left.touch()
    others = [tmp_path / ".x-insiders", tmp_path / f".x{OURS}analysis"]
    for other in others:
        other.mkdir()
    with new_file(tmp_path / "x") as held:
        write_text(tmp_path / "x", "another process, meanwhile")
        assert held.exists()
    assert not left.exists()
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("write", [write_text, write_json])
def test_a_full_disk_is_told_with_what_is_free_and_wanted(tmp_path, write):
    (tmp_path / "x").write_text("old")
    with small_disk(100_000), pytest.raises(MoeeError) as caught:
        write(tmp_path / "x", "x" * 200_000)
    assert "200 kB of room" in caught.value.expected
    assert f"free in '{tmp_path}'" in caught.value.found.replace("/x'", "'")
    assert "make room" in caught.value.hint
    assert contents(tmp_path) == {"x": b"old"}


@pytest.mark.parametrize("write", [
    lambda path: np.save(path, np.zeros(100_000)),
    lambda path: save_file({"x": torch.zeros(100_000)}, path),
])  # fmt: skip
def test_libraries_that_tell_of_a_full_disk_in_their_own_words_are_understood(tmp_path, write):
    with small_disk(100_000), pytest.raises(MoeeError, match="room for"), writing(tmp_path / "x"):
        write(tmp_path / "x.npy")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_that_refuses_is_told_and_errors_of_other_places_are_not(tmp_path, code):
    def refused(place):
        raise OSError(code, os.strerror(code), str(place))

    with pytest.raises(MoeeError, match="a place to write"), writing(tmp_path / "new" / "x"):
        refused(tmp_path / "new")
    with pytest.raises(OSError, match="elsewhere"), writing(tmp_path / "new" / "x"):
        refused("/elsewhere/picture.png")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        print(1 / 0)
    with pytest.raises(MoeeError, match="a place to write"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_places_are_tried_before_anything_is_computed(tmp_path):
    check_place(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path, found in (
        (tmp_path / "file" / "x", "a file"), (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "caf\udce9", "UTF-8"), (tmp_path / "a\0", "null"),
    ):  # fmt: skip
        with pytest.raises(MoeeError, match=found):
            check_place(path)
    with pytest.raises(MoeeError, match="1e\\+09 GB of room"):
        check_place(tmp_path / "x", wanted=10**18)
    with small_disk(10), pytest.raises(MoeeError, match="room for"):
        check_place(tmp_path / "x")


def test_sizes_and_checksums():
    texts = [bytes_text(size) for size in (12, 3_100, 4_560_000, 2e10)]
    assert texts == ["12 bytes", "3.1 kB", "4.56 MB", "20 GB"]
    assert (
        files.checksum({"a": 1, "b": [2]})
        == files.checksum({"b": [2], "a": 1})
        != files.checksum({"a": 1})
    )
