"""Images and weights that change under a run, folders that cannot be written to."""

import pytest
from PIL import Image

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.extraction.run import load
from tests.helpers.images import image_folder
from tests.helpers.models import same_models, toy_vit
from tests.helpers.runs import best

CONFIG = best(macs_reduction=0.05, layers=(0,), cluster_tokens=100)
kept_or_not = pytest.mark.parametrize("limits", [Limits(), Limits(disk=0)])


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", {"class0": 4, "class1": 4})


def run(folder, store, model=None, limits=None):
    model = model or toy_vit(depth=2)
    return extract(model, load_images(folder), CONFIG, store=store, limits=limits)


def files(store):
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def last_of(folder):
    return sorted(folder.rglob("*.png"))[-1]


@kept_or_not
@pytest.mark.parametrize(("change", "words"), [
    (lambda folder, _: Image.new("RGB", (40, 40)).save(last_of(folder)), "changed meanwhile"),
    (lambda _, model: model.head.bias.data.add_(1), "changed meanwhile"),
    (lambda folder, _: last_of(folder).unlink(), r"3\.png"),
])  # fmt: skip
def test_what_changes_during_a_run_is_told(folder, monkeypatch, limits, change, words):
    store, model, own = folder.parent / "store", toy_vit(depth=2), recording._run_model
    run(folder, store, toy_vit(seed=1, depth=2))
    before = files(store)

    def change_once(*given):
        monkeypatch.setattr(recording, "_run_model", own)
        change(folder, model)
        return own(*given)

    monkeypatch.setattr(recording, "BATCH", 2)
    monkeypatch.setattr(recording, "_run_model", change_once)
    with pytest.raises(MoeeError, match=words):
        run(folder, store, model, limits)
    assert before.items() <= files(store).items()
    assert not list(store.glob("run-*-*"))
    assert len(list(store.glob("activations-*"))) == 1
    run(folder, store, limits=limits)


def test_changed_images_make_another_run_and_leave_the_old_one(folder, tmp_path):
    first = run(folder, tmp_path / "store")
    before = files(tmp_path / "store")
    Image.new("RGB", (40, 40), "red").save(sorted(folder.rglob("*.png"))[0])
    second = run(folder, tmp_path / "store")
    assert first.provenance["images_sha256"] != second.provenance["images_sha256"]
    assert before.items() <= files(tmp_path / "store").items()
    (old,) = {path.parent for path in before if path.parent.name.startswith("run-")}
    assert same_models(first.model, load(old, dense=toy_vit(depth=2)).model)


@kept_or_not
def test_a_store_that_cannot_be_written_to_is_told(folder, tmp_path, limits):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MoeeError, match="--store DIR, or MOEE_STORE"):
        run(folder, tmp_path / "file", limits=limits)
    assert (tmp_path / "file").read_text() == "in the way"
