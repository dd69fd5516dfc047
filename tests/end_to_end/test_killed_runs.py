"""A run that is killed goes on where it was saved, and comes to the same bytes."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import accumulate as sums
from moee_analysis.extraction.record import calibration_set as calibration
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.calibration_set import Limits
from tests.helpers.images import toy_images
from tests.helpers.models import lively
from tests.helpers.processes import killed_after
from tests.helpers.runs import best

KILLS = 10
LIMITS = {"kept": Limits(), "made again": Limits(disk=0, memory=2e5)}


def extract_often_saved(root, out, tokens):
    """Take a small model apart on one thread, saving sums after every part."""
    torch.set_num_threads(1)
    calibration.PART = recording.BATCH = recording.SAVED_EVERY = 4
    sums.SAVED_AFTER = 0.0
    extracted(root, limits=LIMITS[tokens]).save(out)


def extracted(root, *, images=24, seed=0, **settings):
    config = best(macs_reduction=0.3)
    return extract(lively(seed=seed), toy_images(images), config, store=root, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("tokens", LIMITS)
def test_a_run_killed_at_random_moments_comes_to_the_same_bytes(tmp_path, tokens):
    whole = tmp_path / "whole"
    assert not killed_after(None, extract_often_saved, tmp_path / "alone", whole, tokens)
    rng, kills = np.random.default_rng(len(tokens)), 0
    for attempt in count():
        root, out = tmp_path / f"killed-{attempt}", tmp_path / f"run-{attempt}"
        while killed_after(rng.uniform(0.3, 2.5), extract_often_saved, root, out, tokens):
            kills += 1
            assert not out.exists() or contents(out) == contents(whole)
        assert contents(out) == contents(whole)
        if kills >= KILLS // len(LIMITS):
            break
