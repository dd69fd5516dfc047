"""A run that is killed goes on where it was saved, and comes to the same bytes."""

import errno
import os
import signal

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import accumulate, recording, token_source
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.extraction.record.tokens import TokenPlan
from moee_analysis.models.loading import find_mlps
from tests.helpers.images import contents, toy_images
from tests.helpers.models import toy_vit
from tests.helpers.processes import ended_at
from tests.helpers.runs import best

IMAGES, KILLS = 24, 4
KINDS = ("inputs", "hidden", "gradients")


def record(root, images=IMAGES):
    model, plan = toy_vit(), TokenPlan(6, 1)
    images = toy_images(images)
    return recording.Recording(model, images, tuple(find_mlps(model)), plan, KINDS).to_disk(root)


def record_often_saved(root):
    """Record with gradients on one thread, saving after every batch of four images."""
    torch.set_num_threads(1)
    recording.BATCH = recording.SAVED_EVERY = 4
    record(root)


def extract_often_saved(root, limits):
    """Take a small model apart on one thread, saving sums after every part."""
    torch.set_num_threads(1)
    token_source.PART = recording.BATCH = recording.SAVED_EVERY = 4
    accumulate.SAVED_AFTER = 0.0
    run = extract(toy_vit(), toy_images(12), best(macs_reduction=0.3), store=root, limits=limits)
    run.save(root / "out")


@pytest.mark.parametrize(("work", "name", "flushes"), [
    ((record_often_saved,), "activations-*", 35),
    ((extract_often_saved, Limits()), "out", 107),
    ((extract_often_saved, Limits(disk=0, memory=2e5)), "out", 81),
], ids=["recording", "run", "run without activations"])  # fmt: skip
def test_a_run_killed_at_random_moments_comes_to_the_same_bytes(tmp_path, work, name, flushes):
    target, *limits = work
    assert ended_at(0, 0, target, tmp_path / "whole", *limits) == 0
    (whole,) = (tmp_path / "whole").glob(name)
    rng, kills = np.random.default_rng(0), 0
    while kills < KILLS:
        root, code = tmp_path / f"killed-{kills}", None
        while code != 0:
            code = ended_at(rng.integers(1, flushes), signal.SIGKILL, target, root, *limits)
            assert code in {0, -signal.SIGKILL}
            kills += code != 0
            finished = list(root.glob(name))
            assert not finished or contents(finished[0]) == contents(whole)
        assert finished
        assert not list(root.glob(".*"))


def test_only_what_is_not_saved_is_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "BATCH", 4)
    monkeypatch.setattr(recording, "SAVED_EVERY", 8)
    whole = record(tmp_path / "whole", images=30)
    seen, own = [], recording._run_model

    def stop_at(number):
        def see_until(task, x, numbers):
            if numbers[0] == number:
                raise KeyboardInterrupt
            seen.append(numbers[0])
            return own(task, x, numbers)

        return see_until

    monkeypatch.setattr(recording, "_run_model", stop_at(20))
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "stopped", images=30)
    assert seen == [0, 4, 8, 12, 16]
    seen.clear()
    monkeypatch.setattr(recording, "_run_model", stop_at(None))
    again = record(tmp_path / "stopped", images=30)
    assert seen == [16, 20, 24, 28]
    assert contents(again) == contents(whole)


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recording.os, "posix_fallocate", full)
    with pytest.raises(MoeeError, match="No space left"):
        record(tmp_path, images=8)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MoeeError, match="a place to write"):
        record(tmp_path / "file", images=8)
    assert (tmp_path / "file").read_text() == "in the way"
