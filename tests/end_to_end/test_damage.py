"""Runs, stores and checkpoints damaged at random: the same outputs, or one clear error."""

import os
import shutil

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.training import trainer as training
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.training.trainer import read_checkpoint
from moee_analysis.utils.storage.store import ASIDE, get_or_build, present, unfinished_folder
from tests.helpers.images import contents, toy_images
from tests.helpers.models import TINY, lively, pixels_of, same_models
from tests.helpers.runs import best


def flip(path, rng):
    """One bit, more often near the beginning, where headers are."""
    content = bytearray(path.read_bytes() or b"\0")
    place = rng.integers(min(len(content), 300) if rng.random() < 0.3 else len(content))
    content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size + 1) * (rng.random() < 0.7))


def fill(path, rng):
    """A block of other bytes, as a bad sector gives."""
    content = bytearray(path.read_bytes())
    start = rng.integers(len(content) + 1)
    content[start : start + 64] = rng.bytes(64)
    path.write_bytes(content)


def exchange(path, rng):
    others = sorted(other for other in path.parent.iterdir() if other.is_file())
    shutil.copyfile(others[rng.integers(len(others))], path.with_name("other"))
    path.with_name("other").replace(path)


def lose(path, rng):
    path.unlink()


def put_in_its_place(path, rng):
    path.unlink()
    rng.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)])()


KINDS = {flip: 60, cut: 25, fill: 25, exchange: 15, lose: 10, put_in_its_place: 15}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def damage(folder, kind, rng):
    """Damage one file of the folder; return its name, for a message."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = files[rng.integers(len(files))]
    kind(path, rng)
    return path.name


def any_kind(rng):
    return rng.choice(list(KINDS), p=np.array([*KINDS.values()]) / sum(KINDS.values()))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A store with all that an extraction keeps, and its run."""
    root = tmp_path_factory.mktemp("damage")
    run = extract(lively(**TINY), toy_images(8), best(macs_reduction=0.3), store=root / "store")
    run.save(root / "run")
    return root, run


@every_kind
def test_a_damaged_run_is_the_same_or_refused(work, tmp_path, kind):
    rng, (root, run) = np.random.default_rng(0), work
    x, refused = pixels_of(run.model, count=2), 0
    for number in range(KINDS[kind]):
        folder = tmp_path / "run"
        shutil.copytree(root / "run", folder)
        what = damage(folder, kind, rng)
        try:
            found = load(folder)
        except MoeeError:
            refused += 1
        else:
            assert torch.equal(found.model(x), run.model(x)), (number, what)
        shutil.rmtree(folder)
    assert refused > KINDS[kind] / 3


@every_kind
def test_what_is_damaged_in_a_store_is_seen(work, tmp_path, capsys, kind):
    rng, (root, _) = np.random.default_rng(1), work
    folders, seen = sorted((root / "store").iterdir()), 0
    for number in range(KINDS[kind]):
        whole = folders[rng.integers(len(folders))]
        folder = tmp_path / whole.name
        shutil.copytree(whole, folder)
        what = damage(folder, kind, rng)
        if present(folder):
            assert contents(folder) == contents(whole), (number, what)
            shutil.rmtree(folder)
        else:
            assert "is damaged" in capsys.readouterr().out
            shutil.rmtree(tmp_path / f"{ASIDE}{whole.name}")
            seen += 1
    assert seen > KINDS[kind] / 3


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_store_makes_the_same_run(work, tmp_path, seed):
    rng, (root, run) = np.random.default_rng(seed), work
    store = tmp_path / "store"
    shutil.copytree(root / "store", store)
    for folder in store.iterdir():
        if folder.name.startswith("run-"):
            shutil.rmtree(folder)
        elif rng.random() < 0.5:
            damage(folder, any_kind(rng), rng)
    again = extract(lively(**TINY), toy_images(8), best(macs_reduction=0.3), store=store)
    assert same_models(again.model, run.model)


def test_a_damaged_or_forged_run_of_a_store_is_made_again(work, tmp_path):
    root, run = work
    store = tmp_path / "store"
    shutil.copytree(root / "store", store)
    (found,) = store.glob("run-*")
    flip(found / "model.safetensors", np.random.default_rng(0))
    again = extract(lively(**TINY), toy_images(8), best(macs_reduction=0.3), store=store)
    assert same_models(again.model, run.model)
    shutil.rmtree(found)
    get_or_build(store, found.name, lambda folder: (folder / "run.json").write_text("{}"))
    again = extract(lively(**TINY), toy_images(8), best(macs_reduction=0.3), store=store)
    assert same_models(again.model, run.model)


TUNING = FinetuneConfig(epochs=3, batch_size=8, learning_rate=1e-4, augmentation="none")


@pytest.fixture(scope="module")
def stopped(work, tmp_path_factory):
    """A fine-tuning that was stopped in its last epoch, and the one that nobody stops."""
    _, run = work
    root = tmp_path_factory.mktemp("tuning")
    own = training.Training._next_epoch

    def stop(self):
        if self.epochs == 2:
            raise KeyboardInterrupt
        own(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "_next_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(run, toy_images(8), TUNING, out=root / "out")
    return unfinished_folder(root / "out"), finetune(run, toy_images(8), TUNING).run


@every_kind
def test_a_damaged_checkpoint_is_the_same_or_refused(stopped, tmp_path, kind):
    rng, (whole, _) = np.random.default_rng(2), stopped
    progress, groups = read_checkpoint(whole)
    refused = 0
    for number in range(KINDS[kind]):
        folder = tmp_path / "work"
        shutil.copytree(whole, folder)
        what = damage(folder, kind, rng)
        try:
            found = read_checkpoint(folder)
        except MoeeError:
            refused += 1
        else:
            same = found is None or (
                found[0] == progress
                and all(
                    torch.equal(found[1][group][name], tensor)
                    for group, own in groups.items()
                    for name, tensor in own.items()
                )
            )
            assert same, (number, what)
        shutil.rmtree(folder)
    assert refused > KINDS[kind] / 4


@pytest.mark.parametrize("seed", range(3))
def test_a_training_goes_on_or_begins_again_to_the_same_model(work, stopped, tmp_path, seed):
    rng, (whole, right) = np.random.default_rng(seed), stopped
    folder = unfinished_folder(tmp_path / "out")
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").write_text("a foreign file")
    if seed:
        damage(folder, any_kind(rng), rng)
    tuned = finetune(work[1], toy_images(8), TUNING, out=tmp_path / "out")
    assert same_models(tuned.run.model, right.model)
    foreign = sorted(contents(folder)) if folder.exists() else []
    assert foreign in ([], ["model.safetensors"])  # another's, which stays
    assert sorted(contents(tmp_path / "out")) == ["metrics.csv", "model.safetensors", "run.json"]
