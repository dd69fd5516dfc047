from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording, token_source
from moee_analysis.extraction.record.token_source import Limits, calibration_tokens
from tests.helpers.images import toy_images
from tests.helpers.models import lively, same_models, toy_vit
from tests.helpers.processes import processes
from tests.helpers.runs import best, quick

IMAGES = 22
NOWHERE = Limits(disk=0)
ALL_TOKENS = quick(
    macs_reduction=0.05, tokens_per_image=101, cluster_tokens=100, refit="shared", layers=(0, 5)
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of two batches; elsewhere too they are whole batches."""
    assert token_source.PART % recording.BATCH == 0
    monkeypatch.setattr(token_source, "PART", 8)
    monkeypatch.setattr(recording, "BATCH", 4)


def made(root, config=None, limits=None):
    config = (config or best()).resolved()
    return calibration_tokens(toy_vit(), toy_images(IMAGES), config, root=root, limits=limits)


def rows_of(tokens):
    """All that is known of every row, by site and name, the parts one after the other."""
    found = defaultdict(list)
    for part in tokens.parts(tokens.sites, gradients="gradients" in tokens.kinds):
        for site, layer in part.items():
            for name in ("inputs", "image", "position", "weight"):
                found[site, name].extend(getattr(layer.sample, name))
            found[site, "hidden"].extend(layer.hidden(slice(None)).numpy())
            found[site, "start"].append(layer.sample.start)
            if layer.sample.norms is not None:
                found[site, "gradients"].extend(layer.sample.gradients(slice(None)).swapaxes(0, 1))
    return found


def first_images(tokens, **settings):
    parts = tokens.parts(tokens.sites, **settings)
    return [int(part["blocks.0.mlp"].sample.image[0]) for part in parts]


@pytest.mark.parametrize("config", [best(), quick(), best(metric="outputs")])
def test_tokens_are_the_same_whether_they_are_kept_or_made_again(tmp_path, monkeypatch, config):
    again = rows_of(made(tmp_path / "again", config, NOWHERE))
    kept = rows_of(made(tmp_path, config))
    assert again.keys() == kept.keys()
    assert (("blocks.0.mlp", "gradients") in kept) is config.resolved().needs_gradients
    for name, values in again.items():
        np.testing.assert_array_equal(values, kept[name], err_msg=str(name))
    np.testing.assert_array_equal(np.unique(kept["blocks.0.mlp", "image"]), np.arange(IMAGES))
    per_image = made(tmp_path, config).whole.kept["blocks.1.mlp"]
    assert kept["blocks.1.mlp", "start"] == [0, 8 * per_image, 16 * per_image]
    monkeypatch.setattr(recording.Recording, "in_memory", lambda _: pytest.fail("again"))
    rows_of(made(tmp_path, config, NOWHERE))  # kept already: used even without room


def test_some_parts_can_be_skipped_or_left_out(tmp_path):
    for limits in (Limits(), NOWHERE):
        tokens = made(tmp_path, limits=limits)
        assert [first_images(tokens, skip=skip) for skip in (0, 1, 3)] == [[0, 8, 16], [8, 16], []]
        assert first_images(replace(tokens, numbers=(1, 7, 17))) == [0, 16]


def test_the_disk_is_used_up_to_its_limit(tmp_path):
    size = made(tmp_path).whole.bytes
    assert made(tmp_path, limits=Limits(disk=size)).on_disk
    assert not made(tmp_path, limits=Limits(disk=size - 1)).on_disk
    for _ in made(tmp_path, limits=NOWHERE).parts(made(tmp_path).sites):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("config", "hidden", "gradients"), [
    (quick(), True, False), (best(), False, True), (best(metric="outputs"), False, False),
    (quick(metric="fisher"), False, True),
])  # fmt: skip
def test_only_what_a_recipe_needs_is_recorded(tmp_path, config, hidden, gradients):
    tokens = made(tmp_path, config, NOWHERE)
    site = tokens.sites[0]
    for asked in (True, False):  # gradients are made only where they are asked for
        (layers, *_) = tokens.parts([site], gradients=asked)
        assert list(layers) == [site.name]
        sample = layers[site.name].sample
        assert isinstance(sample.hidden, np.ndarray) is hidden
        assert (sample.directions is not None) is (gradients and asked)


@pytest.mark.parametrize(("recipe", "pieces"), [(quick, {}), (best, {}), (best, {"order": "obs"})])
def test_limits_change_nothing_about_a_run(recipe, pieces):
    config = recipe(macs_reduction=0.1, cluster_tokens=100, layers=(0, 1), **pieces)
    first, *others = (
        extract(toy_vit(depth=2), toy_images(IMAGES), config, limits=limits).model
        for limits in (None, Limits(memory=1e5), Limits(memory=1, disk=0))
    )
    assert all(same_models(first, other) for other in others)


def memory(name):
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def peak(images, limits):
    """The most bytes that an extraction from so many images takes beyond what there was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = memory("VmRSS")
    extract(lively(), toy_images(images), ALL_TOKENS, limits=limits)
    return memory("VmHWM") - before


def peaks():
    """Peaks of few and of many images, on disk and not, once all is imported and warm."""
    torch.set_num_threads(1)
    token_source.PART = recording.BATCH = recording.SAVED_EVERY = 8
    return [[peak(n, limits) for limits in (Limits(), NOWHERE)] for n in (8, 24, 160)]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    _, few, many = ProcessPoolExecutor(1, processes()).submit(peaks).result()
    config, images = ALL_TOKENS.resolved(), toy_images(8)
    size = calibration_tokens(lively(), images, config, root=tmp_path).whole.bytes / 8
    for small, large in zip(few, many, strict=True):
        assert large - small < 0.45 * 136 * size
