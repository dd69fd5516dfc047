"""Making a recording: what it holds, what decides it, what it refuses."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import LayerScale

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import recording as recordings
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.extraction.record.recording import CONTENTS, Recording, load_sample
from moee_analysis.extraction.record.tokens import TokenPlan, capture_mlps, token_plan
from moee_analysis.models.loading import build_model, find_mlps
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_swin, toy_vit

IMAGES = toy_images(6)
GRADED = {"kinds": ("inputs", "gradients"), "probes": 3}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(recordings, "BATCH", 4)  # the last batch is not full


def recorded(root, model=None, images=IMAGES, *, per_image=5, seed=0, **settings):
    model = model or toy_vit()
    sites = find_mlps(model)
    plan = token_plan(model, [site.name for site in sites], per_image, seed=seed)
    return Recording(model, images, tuple(sites), plan, **settings).to_disk(root)


def rows_of(model, images, site, sample, kind):
    """The sampled rows, taken from one plain pass over all images."""
    with capture_mlps(model, [site]) as captured:
        model(torch.cat(list(images.batches(model))))
    tokens = captured[site.name][kind]
    return tokens.reshape(len(images), -1, tokens.shape[-1])[places(sample)]


def places(sample):
    return tuple(torch.tensor(np.array(v)).long() for v in (sample.image, sample.position))


# A sample


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
def test_the_sample_holds_the_direct_values_in_half_precision(tmp_path, build):
    model, prefix = build(), int(build is toy_vit)
    found = recorded(tmp_path, model, seed=5, kinds=tuple(CONTENTS), probes=3)
    x = torch.cat(list(IMAGES.batches(model)))
    seeds = [(5, image) for image in range(len(IMAGES))]
    gradients = output_gradients(model, find_mlps(model), x, seeds=seeds, probes=3)
    for site in find_mlps(model):
        sample = load_sample(found, site)
        for kind in ("inputs", "hidden"):
            values = getattr(sample, kind)
            assert values.dtype == np.float16
            wanted = rows_of(model, IMAGES, site, sample, kind)
            np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-4)
        g = gradients[site.name][:, *places(sample)]
        close = {"rtol": 2e-3, "atol": 1e-3 * float(g.abs().max())}
        np.testing.assert_allclose(sample.gradients(slice(None)), g, **close)
        assert (sample.directions.dtype, sample.norms.dtype) == (np.float16, np.float32)
        assert sample.directions.shape == (*sample.norms.shape, site.dim)
        lengths = np.linalg.norm(sample.directions.astype(np.float32), axis=-1)
        np.testing.assert_allclose(lengths, sample.norms > 0, atol=1e-3)
        assert np.bincount(sample.image).tolist() == [5 + prefix] * len(IMAGES)
        tokens = 17 if prefix else 64 // 4**site.index
        np.testing.assert_allclose(np.bincount(sample.image, sample.weight), tokens)
        assert (sample.position == 0).sum() == len(IMAGES) or not prefix
    if prefix:  # only the CLS token is read after the last block
        assert sample.norms.any()
        assert not sample.norms[sample.position > 0].any()


def test_windows_handed_to_an_mlp_one_by_one_are_tokens_of_their_image():
    model = build_model("mobilevit_xxs")
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    images, site = toy_images(3), find_mlps(model)[0]
    sample = Recording(model, images, (site,), TokenPlan(5, 0)).in_memory()[site.name]
    assert sample.image.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    wanted = rows_of(model, images, site, sample, "hidden")
    np.testing.assert_allclose(sample.hidden, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_gradients_of_any_magnitude_are_recorded(tmp_path, scale):
    model, site = toy_vit(), find_mlps(toy_vit())[1]
    plain = load_sample(recorded(tmp_path, model, **GRADED), site)
    for parameter in model.blocks[1].mlp.fc2.parameters():
        parameter.div_(scale)
    model.blocks[1].ls2 = LayerScale(32, init_values=scale)
    scaled = load_sample(recorded(tmp_path, model, **GRADED), site)
    np.testing.assert_allclose(scaled.norms, scale * plain.norms, rtol=1e-3)
    np.testing.assert_allclose(scaled.directions, plain.directions, atol=2e-3)


def test_any_rows_of_the_gradients_can_be_read_and_what_was_not_recorded_is_none(tmp_path):
    site = find_mlps(toy_vit())[0]
    sample, plain = (load_sample(recorded(tmp_path, **kinds), site) for kinds in (GRADED, {}))
    whole = (sample.directions.astype(np.float32) * sample.norms[:, :, None]).swapaxes(0, 1)
    assert sample.gradients(slice(None)).dtype == np.float32
    for rows in (slice(3, 9), np.array([20, 4, 4]), np.arange(36) % 3 == 0):
        np.testing.assert_array_equal(sample.gradients(rows), whole[:, rows])
    assert sample.hidden is plain.directions is plain.norms is None


@pytest.mark.parametrize("kinds", [("inputs", "hidden"), ("inputs", "gradients")])
def test_images_that_are_a_part_of_many_have_the_same_tokens_on_disk_or_not(tmp_path, kinds):
    images, sites = toy_images(12), tuple(find_mlps(toy_vit()))
    whole, rest = (
        Recording(toy_vit(), images.take(range(first, 12)), sites, TokenPlan(5, 1, 3, first), kinds)
        for first in (0, 8)
    )
    folder, parts = whole.to_disk(tmp_path), rest.in_memory()
    for site in sites:
        part, expected = parts[site.name], load_sample(folder, site).part(slice(8 * 6, None))
        assert part.start == expected.start == 48
        for name in ("inputs", "hidden", "image", "position", "weight", "directions", "norms"):
            np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))


def test_a_recording_is_found_again_by_all_that_decides_it(tmp_path, monkeypatch):
    first = recorded(tmp_path)
    others = [
        {"model": toy_vit(seed=1)}, {"images": toy_images(7)}, {"seed": 1}, {"per_image": 4},
        {"kinds": ("inputs",)}, {"kinds": ("inputs", "gradients")}, {"kinds": tuple(CONTENTS)},
        {"kinds": ("inputs", "gradients"), "probes": 1},
    ]  # fmt: skip
    part = Recording(toy_vit(), IMAGES, tuple(find_mlps(toy_vit())), TokenPlan(5, 1, 0, 4))
    folders = {recorded(tmp_path, **given) for given in others} | {first, part.folder(tmp_path)}
    assert len(folders) == len(others) + 2
    monkeypatch.setattr(recordings, "_record_into", lambda *_, **__: pytest.fail("again"))
    assert recorded(tmp_path) == first
    assert recorded(tmp_path, kinds=("hidden", "inputs"), probes=7) == first


# What is told and refused


def test_the_log_says_how_large_a_recording_is_and_how_far(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr("moee_analysis.utils.progress.SHORT", 0)
    recorded(tmp_path, **GRADED)
    told = capsys.readouterr()
    assert told.err.startswith("recording 3 layers on 6 images, 6 tokens of each")
    assert "recording with gradients: 2/2" in told.err


@pytest.mark.parametrize(("kinds", "value"), [({}, 1e6), ({}, np.nan), (GRADED, np.nan)])
def test_activations_beyond_half_precision_are_refused(tmp_path, kinds, value):
    model = toy_vit()
    model.blocks[1].mlp.fc1.bias[3] = value
    with pytest.raises(MoeeError, match=r"larger or NaN values in blocks\.[01]\.mlp"):
        recorded(tmp_path, model, **kinds)
    assert not list(tmp_path.iterdir())
    assert hooks_of(model) == 0


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
@pytest.mark.parametrize("kinds", [{}, GRADED])
def test_a_full_disk_is_told_before_recording(tmp_path, monkeypatch, build, kinds):
    usage = namedtuple("usage", "free")
    folder = recorded(tmp_path / "roomy", build(), **kinds)
    size = sum(np.load(path).nbytes for path in folder.glob("*.*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size))
    recorded(tmp_path / "just enough", build(), **kinds)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size - 1))
    with pytest.raises(MoeeError, match="set MOEE_STORE") as error:
        recorded(tmp_path / "too little", build(), **kinds)
    assert "free disk" in error.value.expected
    assert not list((tmp_path / "too little").iterdir())
