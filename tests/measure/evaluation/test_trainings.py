import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from torch import nn
from torch.utils.benchmark import set_torch_threads

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.training.config import SupervisedConfig
from moee_analysis.training.supervised import right_of, train
from tests.helpers.images import contents, toy_images
from tests.helpers.models import same_models, toy_vit
from tests.helpers.processes import processes

TRAINING, IMAGES = toy_images(40).take(range(24)), toy_images(40).take(range(24, 40))
CONFIG = SupervisedConfig(steps=4, batch_size=8, check_every=2)
STARTS = {"shallow": lambda seed: toy_vit(depth=1, seed=seed), "deep": lambda s: toy_vit(seed=s)}


def trained_in(store, starts=STARTS, *, config=CONFIG, seeds=(3, 5), workers=1):
    facts = {"seeds": seeds, "store": store, "workers": workers}
    return measure.trainings(starts, TRAINING, IMAGES, config, **facts)


@pytest.fixture(scope="module")
def trained(store):
    return trained_in(store)


def test_every_start_is_trained_with_every_seed(trained):
    history = trained.history
    assert list(history.columns) == ["start", "seed", "step", "epoch", "images", "loss", "top1"]
    assert history["start"].tolist() == ["shallow"] * 6 + ["deep"] * 6
    assert history["seed"].tolist() == [3, 3, 3, 5, 5, 5] * 2
    assert history["images"].tolist() == [0, 16, 32] * 4
    assert trained.right.shape == (2, 2, 3, 16)
    assert trained.right.mean(axis=3).ravel().tolist() == history["top1"].tolist()
    assert trained.starts == ["shallow", "deep"]
    assert trained.sizes["params"].is_monotonic_increasing
    turned = trained.of(["deep", "shallow"])
    assert turned.starts == ["deep", "shallow"]
    assert np.array_equal(turned.right, trained.right[::-1])
    assert turned.history["top1"].tolist() == turned.right.mean(axis=3).ravel().tolist()


def test_each_is_made_by_train(trained):
    with set_torch_threads(1):  # sums of other threads have other last digits
        alone = train(STARTS["deep"](5), TRAINING, replace(CONFIG, seed=5), check=IMAGES)
    kept = trained.trained("deep", 5, STARTS["deep"](5))
    assert same_models(alone.model, kept)
    assert np.array_equal(alone.right, trained.right[1, 1])
    assert right_of(kept, IMAGES).tolist() == trained.right[1, 1, -1].tolist()


def test_finished_trainings_are_found_again_and_others_are_made(trained, store):
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("trained-*/*")}
    again = trained_in(store, {"deep": STARTS["deep"], "same": STARTS["shallow"]})
    assert {path.name: path.stat().st_mtime_ns for path in store.glob("trained-*/*")} == before
    assert np.array_equal(again.right, trained.right[::-1])
    folders = set(store.iterdir())
    trained_in(store, {"deep": STARTS["deep"]}, config=replace(CONFIG, check_every=1))
    assert len(set(store.iterdir()) - folders) == 2


def test_rates_that_are_no_weights_make_another_training(store, trained):
    """Dropout is in no state dict: a store that looked at weights alone would mix them up."""

    def dropping(seed):
        model = toy_vit(seed=seed)
        model.blocks[1].mlp.drop1 = nn.Dropout(0.5)
        return model.eval()

    other = trained_in(store, {"deep": dropping}, seeds=(3,))
    assert not other.history["loss"].equals(trained.history["loss"][6:9])
    assert other.folders["deep", 3] != trained.folders["deep", 3]


def test_processes_side_by_side_come_to_the_same_bytes(trained, tmp_path, monkeypatch):
    quick = processes()  # have imported everything
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: quick)
    beside = trained_in(tmp_path, workers=2)
    assert all(
        contents(beside.folders[key]) == contents(own) for key, own in trained.folders.items()
    )
    assert beside.history.equals(trained.history)


@pytest.mark.parametrize(("starts", "seeds", "images", "message"), [
    ({}, (0,), IMAGES, "a start or more"), (STARTS, (), IMAGES, "a start or more"),
    (STARTS, (1, 1), IMAGES, "a start or more"), (STARTS, (0,), TRAINING, "not trained on"),
])  # fmt: skip
def test_nothing_to_train_and_images_in_both_sets_are_refused(
    store, starts, seeds, images, message
):
    with pytest.raises(MoeeError, match=message):
        measure.trainings(starts, TRAINING, images, CONFIG, seeds=seeds, store=store)


def test_a_start_that_diverges_is_named_and_leaves_no_folder(tmp_path):
    def infinite(seed):
        model = toy_vit(seed=seed)
        model.head.weight.fill_(float("inf"))
        return model

    with pytest.raises(MoeeError, match=r"'wild': nan"):
        trained_in(tmp_path, {"wild": infinite})
    assert list(tmp_path.iterdir()) == []
