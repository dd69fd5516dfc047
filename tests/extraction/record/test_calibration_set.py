from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import calibration_set as calibrations
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.calibration_set import Calibration, Limits, calibration_of
from moee_analysis.models.loading import find_mlps
from tests.helpers.makers import best, quick
from tests.helpers.toys import toy_images, toy_vit

IMAGES = 22
NOWHERE = Limits(disk=0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of two batches; elsewhere too they are whole batches."""
    assert calibrations.PART % recording.BATCH == 0
    monkeypatch.setattr(calibrations, "PART", 8)
    monkeypatch.setattr(recording, "BATCH", 4)


def made(root, config=None, **settings):
    return Calibration(
        toy_vit(), toy_images(IMAGES), (config or best()).resolved(), root, **settings
    )


def rows_of(calibration, **settings):
    """All rows of every site, the parts one after the other."""
    parts = list(calibration.parts(calibration.sites, **settings))
    found = {}
    for site in calibration.sites:
        samples = [part[site.name].sample for part in parts]
        for name in ("inputs", "image", "position", "weight"):
            values = [np.array(getattr(sample, name)) for sample in samples]
            found[site.name, name] = np.concatenate(values)
        found[site.name, "hidden"] = np.concatenate([s.hidden[0 : len(s)] for s in samples])
        found[site.name, "start"] = np.array([sample.start for sample in samples])
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=str(name))


@pytest.mark.parametrize("config", [best(), quick(), best(metric="outputs")])
def test_tokens_are_the_same_whether_they_are_kept_or_made_again(tmp_path, config):
    config = replace(config, calibration_images=None)
    kept = rows_of(made(tmp_path / "kept", config), gradients=True)
    same(kept, rows_of(made(tmp_path / "again", config, limits=NOWHERE), gradients=True))
    assert len(kept["blocks.0.mlp", "start"]) == 3
    np.testing.assert_array_equal(np.unique(kept["blocks.0.mlp", "image"]), np.arange(IMAGES))


def test_gradients_are_the_same_whether_they_are_kept_or_made_again(tmp_path):
    both = []
    for limits in (Limits(), NOWHERE):
        calibration = made(tmp_path / str(limits.disk), limits=limits)
        parts = calibration.parts(calibration.sites, gradients=True)
        both.append([{n: p[n].sample.gradients(slice(None)) for n in p} for p in parts])
    for one, other in zip(*both, strict=True):
        same(one, other)


def test_rows_are_numbered_through_all_images(tmp_path):
    calibration = made(tmp_path)
    found = rows_of(calibration)
    kept = calibration.kept_per_image["blocks.1.mlp"]
    np.testing.assert_array_equal(found["blocks.1.mlp", "start"], kept * np.arange(0, IMAGES, 8))


def test_parts_at_the_beginning_can_be_skipped(tmp_path):
    calibration = made(tmp_path)
    for skip in range(4):
        parts = list(calibration.parts(calibration.sites, skip=skip))
        seen = [int(part["blocks.0.mlp"].sample.image[0]) for part in parts]
        assert seen == [0, 8, 16][skip:]


def test_without_room_nothing_is_on_the_disk(tmp_path):
    calibration = made(tmp_path, limits=NOWHERE)
    assert not calibration.on_disk
    for _ in calibration.parts(calibration.sites):
        assert not list(tmp_path.iterdir())


def test_the_disk_is_used_up_to_its_limit(tmp_path):
    size = made(tmp_path).bytes_of(IMAGES)
    assert made(tmp_path, limits=Limits(disk=size)).on_disk
    assert not made(tmp_path, limits=Limits(disk=size - 1)).on_disk


def test_only_parts_with_images_that_are_looked_at_are_seen(tmp_path):
    for limits in (Limits(), NOWHERE):
        calibration = made(tmp_path, looked_at=(1, 7, 17), limits=limits)
        parts = calibration.parts(calibration.sites)
        assert [int(part["blocks.0.mlp"].sample.image[0]) for part in parts] == [0, 16]


def test_what_is_kept_already_is_used_even_without_room(tmp_path, monkeypatch):
    rows_of(made(tmp_path))
    monkeypatch.setattr(recording.Recording, "held", lambda _: pytest.fail("again"))
    rows_of(made(tmp_path, limits=NOWHERE))


def test_gradients_are_made_again_only_where_they_are_asked_for(tmp_path):
    calibration = made(tmp_path, limits=NOWHERE)
    sites = find_mlps(calibration.model)[:1]
    (first, *_) = calibration.parts(sites, gradients=False)
    assert list(first) == [sites[0].name]
    assert first[sites[0].name].sample.directions is None


def test_the_calibration_images_are_those_of_the_configuration(tmp_path):
    config = best(calibration_images=9, seed=3).resolved()
    found = calibration_of(toy_vit(), toy_images(30), config, root=tmp_path)
    assert found.images.rows == toy_images(30).limit(9, seed=3).rows


@pytest.mark.parametrize("pieces", [{}, {"order": "obs", "refit": "each"}])
@pytest.mark.parametrize("recipe", [best, quick])
def test_limits_change_nothing_about_a_run(recipe, pieces):
    config = recipe(macs_reduction=0.3, **pieces)
    runs = [
        extract(toy_vit(), toy_images(IMAGES), config, limits=limits)
        for limits in (None, NOWHERE, Limits(memory=1e5), Limits(memory=1, disk=0))
    ]
    first, *others = (run.model.state_dict() for run in runs)
    for other in others:
        assert first.keys() == other.keys()
        for name, values in first.items():
            assert torch.equal(values, other[name]), name
