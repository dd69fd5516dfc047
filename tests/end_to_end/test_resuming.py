"""A recording that is killed goes on where it was saved, and comes to the same bytes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import activation_files, recording
from moee_analysis.extraction.record.hooks import TokenPlan
from moee_analysis.extraction.record.recording import record
from moee_analysis.models.loading import find_mlps
from moee_analysis.utils.storage.checksums import SEAL
from moee_analysis.utils.storage.store import resumed
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit

IMAGES, KILLS = 120, 10
KINDS = ("inputs", "hidden", "gradients")


def record_often_saved(root):
    """Record with gradients on one thread, saving after every batch of four images."""
    torch.set_num_threads(1)
    recording.BATCH = recording.SAVED_EVERY = 4
    return recorded(root)


def recorded(root, images=IMAGES):
    model, plan = toy_vit(), TokenPlan(6, 1)
    return record(model, toy_images(images), find_mlps(model), plan=plan, root=root, kinds=KINDS)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def unfinished(root):
    """Images that are saved in the recording that was killed, None if there is none yet."""
    found = [path.read_text() for path in root.glob(".*-unfinished/progress.json")]
    return json.loads(found[0])["images"] if found else None


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly, as everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def killed_after(processes, root, seconds):
    """Whether a process that records was killed before it had finished."""
    process = processes.Process(target=record_often_saved, args=(root,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0


def test_a_recording_killed_at_random_moments_comes_to_the_same_bytes(processes, tmp_path):
    process = processes.Process(target=record_often_saved, args=(tmp_path / "whole",))
    process.start()
    process.join()
    assert process.exitcode == 0
    (whole,) = (tmp_path / "whole").iterdir()
    rng, saved, kills = np.random.default_rng(0), [], 0
    for attempt in count():
        root = tmp_path / f"killed-{attempt}"
        while killed_after(processes, root, rng.uniform(0.05, 0.6)):
            kills += 1
            saved.append(unfinished(root))
            assert not (root / whole.name).exists()
        assert [path.name for path in root.iterdir()] == [whole.name]
        assert contents(root / whole.name) == contents(whole)
        if kills >= KILLS:
            break
    assert any(images for images in saved if images is not None)


def test_only_what_is_not_saved_is_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "BATCH", 4)
    monkeypatch.setattr(recording, "SAVED_EVERY", 8)
    whole = recorded(tmp_path / "whole", images=30)
    seen, own = [], recording._seen

    def stopping_at(number):
        def seen_until(task, x, numbers):
            if numbers[0] == number:
                raise KeyboardInterrupt
            seen.append(numbers[0])
            return own(task, x, numbers)

        return seen_until

    monkeypatch.setattr(recording, "_seen", stopping_at(20))
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "stopped", images=30)
    assert seen == [0, 4, 8, 12, 16]
    seen.clear()
    monkeypatch.setattr(recording, "_seen", stopping_at(None))
    again = recorded(tmp_path / "stopped", images=30)
    assert seen == [16, 20, 24, 28]
    assert contents(again.folder) == contents(whole.folder)


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(activation_files.os, "posix_fallocate", full)
    with pytest.raises(MoeeError, match="No space left"):
        recorded(tmp_path, images=8)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MoeeError, match="a place to write"):
        recorded(tmp_path / "file", images=8)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_write_that_was_cut_off_is_gone_when_all_is_done(tmp_path):
    def cut_off(folder):
        (folder / ".progress.json-cut").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, "thing", cut_off)
    resumed(tmp_path, "thing", lambda folder: (folder / "whole").touch())
    assert {path.name for path in (tmp_path / "thing").iterdir()} == {"whole", SEAL}


def test_what_a_build_refuses_is_not_kept_but_what_stops_it_is(tmp_path):
    def refuse(folder):
        (folder / "half").touch()
        raise MoeeError("a", "b", "c")

    def stop(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(MoeeError):
        resumed(tmp_path, "thing", refuse)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, "thing", stop)
    found = []
    resumed(tmp_path, "thing", lambda folder: found.extend(p.name for p in folder.iterdir()))
    assert found == ["half"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
