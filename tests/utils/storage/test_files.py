"""Files are read whole or refused, and appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import (
    check_file,
    checksum,
    new_file,
    read_json,
    read_text,
    write_json,
    write_text,
)
from moee_analysis.utils.storage.locks import OURS
from moee_analysis.utils.storage.refusals import (
    bytes_text,
    check_place,
    writing,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk():
    """No file may have more than 100 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def half_written(path):
    with new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError


def odd_folder(path):
    path.mkdir()


def odd_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "no such file"), (odd_folder, "a folder"), (os.mkfifo, "a named pipe"),
        (odd_socket, "a socket"), (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path), "no such file"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_told_and_never_waited_for(tmp_path, make, told, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "x"
    make(path)
    for read in (read_text, read_json, check_file):
        with pytest.raises(MoeeError, match=told):
            read(path, expected="a list")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "complete JSON"), (b'{"a": [1, 2', "complete JSON"), (b"\xff\xfe", "no text"),
        (b'{"a": NaN}', "NaN"), (b"[-Infinity]", "Infinity"), (b"[" * 200_000, "recursion"),
        (b"1" * 10_000, "complete JSON"),
    ],
)  # fmt: skip
def test_json_that_is_none_is_refused(tmp_path, content, told):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(MoeeError, match=told):
        read_json(tmp_path / "x.json", expected="numbers")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    (tmp_path / "x").write_text("1")
    (tmp_path / "x").chmod(0)
    with pytest.raises(MoeeError, match="cannot be read"):
        read_text(tmp_path / "x", expected="a number")


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError):
        half_written(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_a_killed_process_left_goes_with_the_next_file_but_nothing_else(tmp_path):
    left, others = tmp_path / f".x{OURS}{'0' * 32}", tmp_path / ".x-insiders"
    left.touch()
    others.mkdir()
    (tmp_path / f".x{OURS}analysis").mkdir()
    with new_file(tmp_path / "x") as held:
        write_text(tmp_path / "x", "another process, meanwhile")
        assert held.exists()
    assert not left.exists()
    assert others.exists()
    assert (tmp_path / f".x{OURS}analysis").exists()


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "x" * 200_000),
    lambda path: write_json(path, "x" * 200_000),
])  # fmt: skip
def test_a_full_disk_is_told_with_what_is_free_and_wanted(tmp_path, small_disk, write):
    (tmp_path / "x").write_text("old")
    with pytest.raises(MoeeError) as caught:
        write(tmp_path / "x")
    assert "200 kB of room" in caught.value.expected
    assert f"free in '{tmp_path}'" in caught.value.found.replace("/x'", "'")
    assert "make room" in caught.value.hint
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize("write", [
    lambda path: np.save(path, np.zeros(100_000)),
    lambda path: save_file({"x": torch.zeros(100_000)}, path),
])  # fmt: skip
def test_libraries_that_tell_of_a_full_disk_in_their_own_words_are_understood(
    tmp_path, small_disk, write
):
    with pytest.raises(MoeeError, match="room for"), writing(tmp_path / "x"):
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


def test_places_are_tried_before_anything_is_computed(tmp_path, small_disk):
    check_place(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path, told in ((tmp_path / "file" / "x", "a file"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(MoeeError, match=told):
            check_place(path)
    with pytest.raises(MoeeError, match="1e\\+09 GB of room"):
        check_place(tmp_path / "x", wanted=10**18)


def test_a_place_on_a_full_disk_is_refused(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(MoeeError, match="room for"):
            check_place(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sizes_and_checksums():
    told = [bytes_text(size) for size in (12, 3_100, 4_560_000, 2e10)]
    assert told == ["12 bytes", "3.1 kB", "4.56 MB", "20 GB"]
    assert checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1}) != checksum({"a": 1})
