"""Images and weights that change under a run, folders that cannot be written to."""

import numpy as np
import pytest
import torch
from PIL import Image

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.extraction.run import load
from tests.helpers.models import toy_vit
from tests.helpers.runs import best

IMAGES = 8
KEPT = [Limits(), Limits(disk=0)]


@pytest.fixture
def folder(tmp_path):
    """Photographs of noise in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def run(folder, store, *, model=None, limits=None):
    images = load_images(folder)
    return extract(
        model or toy_vit(),
        images,
        best(macs_reduction=0.05, layers=(0, 2), cluster_tokens=100),
        store=store,
        limits=limits,
    )


def files(store):
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def changing(monkeypatch, change):
    """Let ``change`` happen once while images are run through the model."""
    own, changes = recording._seen, [change]

    def seen(*given):
        if changes:
            changes.pop()()
        return own(*given)

    monkeypatch.setattr(recording, "_seen", seen)


@pytest.mark.parametrize("limits", KEPT)
def test_an_image_that_changes_during_a_run_is_told(folder, tmp_path, monkeypatch, limits):
    run(folder, tmp_path / "store", model=toy_vit(seed=1))
    before = files(tmp_path / "store")
    last = sorted(folder.rglob("*.png"))[-1]
    changing(monkeypatch, lambda: Image.new("RGB", (40, 40)).save(last))
    with pytest.raises(MoeeError, match="changed meanwhile"):
        run(folder, tmp_path / "store", limits=limits)
    after = files(tmp_path / "store")
    assert all(after[path] == content for path, content in before.items())
    assert not list((tmp_path / "store").glob("run-*-*"))
    run(folder, tmp_path / "store", limits=limits)


@pytest.mark.parametrize("limits", KEPT)
def test_weights_that_change_during_a_run_are_told(folder, tmp_path, monkeypatch, limits):
    model = toy_vit()
    changing(monkeypatch, lambda: model.head.bias.data.add_(1))
    with pytest.raises(MoeeError, match="changed meanwhile"):
        run(folder, tmp_path / "store", model=model, limits=limits)


@pytest.mark.parametrize("limits", KEPT)
def test_an_image_that_vanishes_is_named(folder, tmp_path, monkeypatch, limits):
    monkeypatch.setattr(recording, "BATCH", 2)
    last = sorted(folder.rglob("*.png"))[-1]
    changing(monkeypatch, last.unlink)
    with pytest.raises(MoeeError, match=last.name):
        run(folder, tmp_path / "store", limits=limits)
    assert not list((tmp_path / "store").glob("activations-*"))


def test_changed_images_make_another_run_and_leave_the_old_one(folder, tmp_path):
    first = run(folder, tmp_path / "store")
    before = files(tmp_path / "store")
    Image.new("RGB", (40, 40), "red").save(sorted(folder.rglob("*.png"))[0])
    second = run(folder, tmp_path / "store")
    assert first.provenance["images_sha256"] != second.provenance["images_sha256"]
    after = files(tmp_path / "store")
    assert all(after[path] == content for path, content in before.items())
    (old,) = {path.parent for path in before if path.parent.name.startswith("run-")}
    again = load(old, dense=toy_vit()).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.model.state_dict().items())


def test_a_store_that_cannot_be_written_to_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for limits in KEPT:
        with pytest.raises(MoeeError, match="--store DIR, or MOEE_STORE"):
            run(folder, tmp_path / "file", limits=limits)
    assert (tmp_path / "file").read_text() == "in the way"
