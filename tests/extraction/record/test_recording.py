"""Making a recording: what it holds, what decides it, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import recording as recordings
from moee_analysis.extraction.record.activation_files import FILES
from moee_analysis.extraction.record.hooks import TokenPlan, recording
from moee_analysis.extraction.record.output_gradients import output_gradients
from moee_analysis.extraction.record.recording import Recording, record
from moee_analysis.extraction.record.token_kinds import token_plan
from moee_analysis.models.loading import build_model, find_mlps, fingerprint
from moee_analysis.utils.storage.checksums import SEAL
from moee_analysis.utils.storage.store import content_key
from tests.helpers.makers import hooks_of
from tests.helpers.toys import toy_images, toy_swin, toy_vit

# A sample on disk


def recorded(model, images, root, *, per_image=5, seed=0, **settings):
    sites = find_mlps(model)
    plan = token_plan(model, [site.name for site in sites], per_image, seed=seed)
    return record(model, images, sites, plan=plan, root=root, **settings)


def rows_of(model, images, site, sample, kind):
    """The sampled rows, taken from one plain pass over all images."""
    with recording(model, [site]) as captured:
        model(torch.cat(list(images.batches(model))))
    tokens = getattr(captured[site.name], kind)
    tokens = tokens.reshape(len(images), -1, tokens.shape[-1])
    image, position = (torch.tensor(np.array(v)).long() for v in (sample.image, sample.position))
    return tokens[image, position]


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
def test_the_sample_holds_the_direct_values_in_half_precision(tmp_path, monkeypatch, build):
    monkeypatch.setattr(recordings, "BATCH", 4)  # the last batch is not full
    model, images = build(), toy_images(10)
    found = recorded(model, images, tmp_path)
    for site in find_mlps(model):
        sample = found.layer(site)
        for kind in ("inputs", "hidden"):
            values = getattr(sample, kind)
            wanted = rows_of(model, images, site, sample, kind)
            assert values.dtype == np.float16
            np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-4)


def test_every_image_is_in_the_sample_with_all_its_weight(tmp_path):
    sample = recorded(toy_vit(), toy_images(10), tmp_path).layer(find_mlps(toy_vit())[0])
    assert np.bincount(sample.image).tolist() == [6] * 10
    np.testing.assert_allclose(np.bincount(sample.image, sample.weight), 17)
    assert (sample.position == 0).sum() == 10


def test_windows_handed_to_an_mlp_one_by_one_are_tokens_of_their_image(tmp_path):
    model = build_model("mobilevit_xxs")
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    images, site = toy_images(3), find_mlps(model)[0]
    plan = TokenPlan(5, 0)
    sample = record(model, images, [site], plan=plan, root=tmp_path).layer(site)
    assert sample.image.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    wanted = rows_of(model, images, site, sample, "hidden")
    np.testing.assert_allclose(sample.hidden, wanted, rtol=1e-3, atol=1e-3)


def test_what_was_recorded_is_found_again(tmp_path, monkeypatch):
    model, images = toy_vit(), toy_images(10)
    first = recorded(model, images, tmp_path)
    monkeypatch.setattr(recordings, "_record_into", lambda *_, **__: pytest.fail("again"))
    assert recorded(toy_vit(), toy_images(10), tmp_path).folder == first.folder


@pytest.mark.parametrize("change", ["model", "images", "seed", "tokens"])
def test_whatever_matters_makes_another_sample(tmp_path, change):
    first = recorded(toy_vit(), toy_images(6), tmp_path)
    other = recorded(
        toy_vit(seed=int(change == "model")), toy_images(7 if change == "images" else 6), tmp_path,
        seed=int(change == "seed"), per_image=4 if change == "tokens" else 5,
    )  # fmt: skip
    assert other.key != first.key


def test_the_size_is_told_before_recording(tmp_path, capsys):
    recorded(toy_vit(), toy_images(10), tmp_path)
    assert capsys.readouterr().out.startswith("recording 3 layers on 10 images, 6 tokens of each")


def test_a_full_disk_is_told_before_recording(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(MoeeError, match="set MOEE_STORE") as error:
        recorded(toy_vit(), toy_images(10), tmp_path)
    assert "free disk" in error.value.expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_activations_beyond_half_precision_are_refused(tmp_path, value):
    model = toy_vit()
    model.blocks[1].mlp.fc1.bias[3] = value
    with pytest.raises(MoeeError, match=r"larger or NaN values in blocks\.1\.mlp"):
        recorded(model, toy_images(6), tmp_path)
    assert not list(tmp_path.iterdir())
    assert hooks_of(model) == 0


# Some of many images


@pytest.mark.parametrize("kinds", [("inputs", "hidden"), ("inputs", "gradients")])
def test_images_that_are_a_part_of_many_have_the_same_tokens(tmp_path, monkeypatch, kinds):
    monkeypatch.setattr(recordings, "BATCH", 4)  # the same batches, to the last bit
    model, images, sites = toy_vit(), toy_images(12), find_mlps(toy_vit())
    whole, rest = (
        record(model, images.take(range(first, 12)), sites, plan=TokenPlan(5, 1, 3, first),
               root=tmp_path, kinds=kinds)
        for first in (0, 8)
    )  # fmt: skip
    for site in sites:
        part, expected = rest.layer(site), whole.layer(site).part(slice(8 * 6, None))
        assert part.start == expected.start == 48
        for name in ("inputs", "hidden", "image", "position", "weight", "directions", "norms"):
            np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))


def test_where_the_images_start_makes_another_sample(tmp_path):
    keys = {
        record(toy_vit(), toy_images(4), find_mlps(toy_vit()), plan=TokenPlan(5, 1, 0, first),
               root=tmp_path).key
        for first in (0, 4)
    }  # fmt: skip
    assert len(keys) == 2


# Before anything is recorded


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
@pytest.mark.parametrize("kinds", [("inputs", "hidden"), ("gradients", "inputs")])
def test_a_recording_knows_its_size_its_tokens_and_its_place(tmp_path, build, kinds):
    model, sites = build(), tuple(find_mlps(build()))
    plan = token_plan(model, [site.name for site in sites], 5)
    task = Recording(model, toy_images(6), sites, plan, kinds)
    assert not task.folder(tmp_path).exists()
    size, kept, tokens = task.bytes, task.kept, task.tokens
    made = task.made(tmp_path)
    assert made.folder == task.folder(tmp_path)
    assert size == sum(np.load(path).nbytes for path in made.folder.glob("*.*.npy"))
    for site in task.sites:
        sample = made.layer(site)
        assert len(sample) == 6 * kept[site.name]
        assert sample.weight.sum() == pytest.approx(6 * tokens[site.name])
    assert hooks_of(model) == 0


# Gradients beside the activations

WITH_GRADIENTS = {"kinds": ("inputs", "gradients"), "probes": 3}


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
@pytest.mark.parametrize("per_image", [5, None])
def test_recorded_gradients_are_those_of_one_plain_pass(tmp_path, monkeypatch, build, per_image):
    monkeypatch.setattr(recordings, "BATCH", 4)  # the last batch is not full
    model, images = build(), toy_images(10)
    found = recorded(model, images, tmp_path, per_image=per_image, seed=3, **WITH_GRADIENTS)
    x = torch.cat(list(images.batches(model)))
    seeds = [(3, number) for number in range(len(images))]
    wanted = output_gradients(model, find_mlps(model), x, seeds=seeds, probes=3)
    for site in find_mlps(model):
        sample = found.layer(site)
        g = wanted[site.name].numpy()[:, sample.image, sample.position]
        close = {"rtol": 2e-3, "atol": 1e-3 * np.abs(g).max()}
        np.testing.assert_allclose(sample.gradients(slice(None)), g, **close)
        np.testing.assert_allclose(sample.norms, np.linalg.norm(g, axis=-1), **close)
        inputs = rows_of(model, images, site, sample, "inputs")
        np.testing.assert_allclose(sample.inputs, inputs, rtol=1e-3, atol=1e-3)


def test_directions_are_unit_vectors_in_half_precision_or_zeros(tmp_path):
    model = toy_vit()
    found = recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS)
    samples = [found.layer(site) for site in find_mlps(model)]
    for sample in samples:
        assert sample.directions.dtype == np.float16
        assert sample.norms.dtype == np.float32
        assert sample.directions.shape == (3, 36, 32)
        lengths = np.linalg.norm(sample.directions.astype(np.float32), axis=-1)
        np.testing.assert_allclose(lengths, sample.norms > 0, atol=1e-3)
    at_patches = samples[-1].norms[:, samples[-1].position > 0]
    assert not at_patches.any()  # only the CLS token is read after the last block
    assert samples[-1].norms.any()


class Scaled(torch.nn.Module):
    """Takes the place of a block's layer scale."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_gradients_of_any_magnitude_are_recorded(tmp_path, scale):
    model, site = toy_vit(), find_mlps(toy_vit())[1]
    plain = recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS).layer(site)
    for parameter in model.blocks[1].mlp.fc2.parameters():
        parameter.div_(scale)
    model.blocks[1].ls2 = Scaled(scale)
    scaled = recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS).layer(site)
    np.testing.assert_allclose(scaled.norms, scale * plain.norms, rtol=1e-3)
    np.testing.assert_allclose(scaled.directions, plain.directions, atol=2e-3)


def test_any_rows_of_the_gradients_can_be_read(tmp_path):
    model = toy_vit()
    sample = recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS).layer(find_mlps(model)[0])
    whole = sample.directions.astype(np.float32) * sample.norms[:, :, None]
    assert sample.gradients(slice(None)).dtype == np.float32
    for rows in (slice(3, 9), np.array([20, 4, 4]), np.arange(36) % 3 == 0):
        np.testing.assert_array_equal(sample.gradients(rows), whole[:, rows])


def test_what_was_not_recorded_is_none(tmp_path):
    model, site = toy_vit(), find_mlps(toy_vit())[0]
    plain = recorded(model, toy_images(6), tmp_path).layer(site)
    assert plain.directions is plain.norms is None
    with pytest.raises(MoeeError, match='record it with the kind "gradients"'):
        plain.gradients(slice(None))
    assert recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS).layer(site).hidden is None
    everything = recorded(
        model, toy_images(6), tmp_path, kinds=("gradients", "hidden", "inputs")
    ).layer(site)
    assert everything.gradients(slice(None)).shape == (2, 36, 32)
    np.testing.assert_array_equal(everything.hidden, plain.hidden)


def test_the_usual_kinds_keep_their_key_and_their_files(tmp_path):
    model, images = toy_vit(), toy_images(6)
    found = recorded(model, images, tmp_path, kinds=("hidden", "inputs"), probes=7)
    sites = [site.name for site in find_mlps(model)]
    assert found.key == content_key(
        model=fingerprint(model), images=images.fingerprint, sites=sites, plan=[5, 1, 0, 0]
    )
    files = {f"{name}.{kind}.npy" for name in sites for kind in ("inputs", "hidden")}
    assert {p.name for p in found.folder.iterdir()} == files | {
        "tokens-17.npy", "manifest.json", SEAL,
    }  # fmt: skip
    assert json.loads((found.folder / "manifest.json").read_text()) == {
        "tokens": dict.fromkeys(sites, 17)
    }


def test_kinds_and_probes_make_another_sample(tmp_path):
    kinds = [("inputs", "hidden"), ("inputs",), ("inputs", "gradients"), FILES]
    wanted = [{"kinds": k} for k in kinds] + [{"kinds": ("inputs", "gradients"), "probes": 1}]
    keys = {recorded(toy_vit(), toy_images(6), tmp_path, **w).key for w in wanted}
    assert len(keys) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"kinds": ("hidden",)}, {"kinds": ("inputs", "outputs")}, {"kinds": ()}, {"probes": 0}],
)
def test_kinds_that_cannot_be_recorded_are_refused(tmp_path, wrong):
    with pytest.raises(MoeeError, match="expected inputs and others of inputs, hidden, gradients"):
        recorded(toy_vit(), toy_images(6), tmp_path, **wrong)


def test_the_size_counts_the_files_of_the_gradients(tmp_path, monkeypatch):
    model, images = toy_vit(), toy_images(6)
    found = recorded(model, images, tmp_path / "roomy", per_image=None, **WITH_GRADIENTS)
    size = sum(np.load(path).nbytes for path in found.folder.glob("blocks.*.npy"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, size))
    recorded(model, images, tmp_path / "just enough", per_image=None, **WITH_GRADIENTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, size - 1))
    with pytest.raises(MoeeError, match="free disk"):
        recorded(model, images, tmp_path / "too little", per_image=None, **WITH_GRADIENTS)


def test_the_log_says_how_far_a_recording_is_if_it_has_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr("moee_analysis.utils.progress.SHORT", 0)
    model, sites = toy_vit(), tuple(find_mlps(toy_vit()))
    task = Recording(model, toy_images(40), sites, TokenPlan(5, 1), **WITH_GRADIENTS)
    task.made(tmp_path / "in silence")
    assert "recording" not in "".join(capsys.readouterr())
    task.made(tmp_path / "told", label="recording")
    told = capsys.readouterr()
    assert told.out.startswith("recording 3 layers on 40 images, 6 tokens of each")
    assert "recording with gradients: 2/2" in told.err


def test_a_failure_with_gradients_leaves_nothing_behind(tmp_path):
    model = toy_vit()
    model.blocks[0].mlp.fc1.bias[3] = float("nan")
    with pytest.raises(MoeeError, match=r"larger or NaN values in blocks\.0\.mlp"):
        recorded(model, toy_images(6), tmp_path, **WITH_GRADIENTS)
    assert not list(tmp_path.iterdir())
    assert hooks_of(model) == 0
