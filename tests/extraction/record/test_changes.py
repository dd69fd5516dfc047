"""Images and weights that change under a run, folders that cannot be written to."""

import pytest
import torch
from PIL import Image

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.extraction.run import load
from tests.helpers.images import image_folder
from tests.helpers.models import toy_vit
from tests.helpers.runs import best

KEPT = [Limits(), Limits(disk=0)]


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", {"class0": 4, "class1": 4})


def run(folder, store, *, model=None, limits=None):
    config = best(macs_reduction=0.05, layers=(0,), cluster_tokens=100)
    return extract(
        model or toy_vit(depth=2), load_images(folder), config, store=store, limits=limits
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


def last_of(folder):
    return sorted(folder.rglob("*.png"))[-1]


@pytest.mark.parametrize("limits", KEPT)
@pytest.mark.parametrize(("change", "words"), [
    (lambda folder, _: Image.new("RGB", (40, 40)).save(last_of(folder)), "changed meanwhile"),
    (lambda _, model: model.head.bias.data.add_(1), "changed meanwhile"),
    (lambda folder, _: last_of(folder).unlink(), r"3\.png"),
])  # fmt: skip
def test_what_changes_during_a_run_is_told(folder, monkeypatch, limits, change, words):
    monkeypatch.setattr(recording, "BATCH", 2)
    store, model = folder.parent / "store", toy_vit(depth=2)
    run(folder, store, model=toy_vit(seed=1, depth=2))
    before = files(store)
    changing(monkeypatch, lambda: change(folder, model))
    with pytest.raises(MoeeError, match=words):
        run(folder, store, model=model, limits=limits)
    after = files(store)
    assert all(after[path] == content for path, content in before.items())
    assert not list(store.glob("run-*-*"))
    assert len(list(store.glob("activations-*"))) == 1
    run(folder, store, limits=limits)


def test_changed_images_make_another_run_and_leave_the_old_one(folder, tmp_path):
    first = run(folder, tmp_path / "store")
    before = files(tmp_path / "store")
    Image.new("RGB", (40, 40), "red").save(sorted(folder.rglob("*.png"))[0])
    second = run(folder, tmp_path / "store")
    assert first.provenance["images_sha256"] != second.provenance["images_sha256"]
    after = files(tmp_path / "store")
    assert all(after[path] == content for path, content in before.items())
    (old,) = {path.parent for path in before if path.parent.name.startswith("run-")}
    again = load(old, dense=toy_vit(depth=2)).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.model.state_dict().items())


def test_a_store_that_cannot_be_written_to_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for limits in KEPT:
        with pytest.raises(MoeeError, match="--store DIR, or MOEE_STORE"):
            run(folder, tmp_path / "file", limits=limits)
    assert (tmp_path / "file").read_text() == "in the way"
