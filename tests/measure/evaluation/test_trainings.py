import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from torch import nn
from torch.utils.benchmark import set_torch_threads

from moee_analysis import measure
from moee_analysis.baselines.controls import statically_pruned
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.trainings import Trainings, draw_curves
from moee_analysis.measure.routing.tables import all_rows
from moee_analysis.training.config import FinetuneConfig, SupervisedConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.training.supervised import right_of, train
from tests.helpers.images import contents, toy_images
from tests.helpers.models import divergence, same_models, toy_vit
from tests.helpers.runs import best

TRAINING, IMAGES = toy_images(40).take(range(24)), toy_images(40).take(range(24, 40))
CONFIG = SupervisedConfig(steps=4, batch_size=8, check_every=2)
STARTS = {"shallow": lambda seed: toy_vit(depth=1, seed=seed), "deep": lambda s: toy_vit(seed=s)}
TUNING = FinetuneConfig(epochs=1, batch_size=8, learning_rate=1e-5, augmentation="none")
COLUMNS = [
    "system", "budget", "stage", "seed", "top1", "retention", "agreement", "kl", "mean", "low",
    "high", "macs_reduction", "params_reduction", "epoch",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs():
    run = extract(toy_vit(), TRAINING, best(macs_reduction=0.3))
    return {"MoEE": [run], "static": [statically_pruned(run, TRAINING)]}


@pytest.fixture(scope="module")
def tuned_table(runs, store):
    drawn = {"seeds": (0, 4), "resamples": 50}
    return measure.fine_tuning(runs, TRAINING, IMAGES, TUNING, store=store, **drawn)


def test_scores_before_and_for_every_seed_after_are_those_of_each_model(tuned_table, runs, store):
    assert list(tuned_table.columns) == COLUMNS
    expected = [("MoEE", "before", 0), ("static", "before", 0)]
    expected += [(s, "after", seed) for s in ("MoEE", "static") for seed in (0, 4)]
    places = tuned_table[["system", "stage", "seed"]]
    assert list(places.itertuples(index=False, name=None)) == expected
    run = runs["MoEE"][0]
    tuned = finetune(run, TRAINING, TUNING, store=store)
    rows = tuned_table.query("system == 'MoEE' and seed == 0").set_index("stage")
    for stage, model in (("before", run.model), ("after", tuned.run.model)):
        expected = divergence(run.dense(), model, IMAGES)
        assert rows.loc[stage, "kl"] == pytest.approx(expected, rel=1e-3)
    assert rows.loc["after", "epoch"] == tuned.best


def test_the_seeds_of_a_stage_share_their_mean_and_a_system_its_savings(tuned_table):
    for _, rows in tuned_table.groupby(["system", "budget", "stage"]):
        assert (rows[["mean", "low", "high"]].nunique() == 1).all()
        assert rows["mean"].iloc[0] == pytest.approx(rows["retention"].mean())
        assert rows["mean"].between(rows["low"] - 1e-9, rows["high"] + 1e-9).all()
    static = tuned_table.loc[tuned_table["system"] == "static", "macs_reduction"]
    assert np.ptp(static) == pytest.approx(0)
    assert static.iloc[0] == pytest.approx(0.3, abs=0.02)
    assert tuned_table.groupby("system")["params_reduction"].nunique().tolist() == [1, 1]


def trained_in(store, starts=STARTS, *, config=CONFIG, seeds=(3, 5), workers=1):
    facts = {"seeds": seeds, "store": store, "workers": workers}
    return measure.trainings(starts, TRAINING, IMAGES, config, **facts)


@pytest.fixture(scope="module")
def trained(store):
    return trained_in(store)


def test_every_start_is_trained_with_every_seed(trained):
    history, turned = trained.history, trained.of(["deep", "shallow"])
    assert list(history.columns) == ["start", "seed", "step", "epoch", "images", "loss", "top1"]
    rows = itertools.product(["shallow", "deep"], [3, 5], [0, 16, 32])
    assert [*history[["start", "seed", "images"]].itertuples(index=False, name=None)] == [*rows]
    assert trained.right.shape == (2, 2, 3, 16)
    assert trained.sizes["params"].is_monotonic_increasing
    assert trained.starts == turned.starts[::-1] == ["shallow", "deep"]
    assert np.array_equal(turned.right, trained.right[::-1])
    for each in (trained, turned):
        assert each.history["top1"].tolist() == each.right.mean(axis=3).ravel().tolist()


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


def test_processes_side_by_side_come_to_the_same_bytes(trained, tmp_path):
    beside = trained_in(tmp_path, workers=2)
    for key, own in trained.folders.items():
        assert contents(beside.folders[key]) == contents(own)
    assert beside.history.equals(trained.history)


def test_a_start_that_diverges_is_named_and_leaves_no_folder(tmp_path):
    def infinite(seed):
        model = toy_vit(seed=seed)
        model.head.weight.fill_(float("inf"))
        return model

    with pytest.raises(MoeeError, match=r"'wild': nan"):
        trained_in(tmp_path, {"wild": infinite})
    assert list(tmp_path.iterdir()) == []


def trainings_of(right):
    """Trainings that came to ``right`` (starts, seeds, looks, images), ten images apart."""
    starts, seeds, looks, _ = right.shape
    history = all_rows(start="abcdef"[:starts], seed=range(seeds), step=range(looks))
    history = history.assign(images=10 * history["step"], loss=1.0, top1=right.mean(axis=3).ravel())
    sizes = pd.DataFrame({"start": list("abcdef"[:starts]), "macs": 5, "params": 7})
    return Trainings(history, right, sizes, {}, "as made")


def drawn(tops, *, seeds=3):
    """Right or wrong by chance, with these top-1 (starts, looks) on average."""
    tops = np.asarray(tops)[:, None, :, None]
    return np.random.default_rng(0).random((len(tops), seeds, tops.shape[2], 400)) < tops


RISING = drawn([[0.1, 0.5, 0.9], [0.1, 0.2, 0.5], [0.1, 0.2, 0.5]])


def test_curves_have_the_mean_and_an_interval_of_all_seeds():
    table = measure.learning_curves(trainings_of(RISING))
    assert len(table) == 3 * 3 * 3
    for (start, images), rows in table.groupby(["start", "images"]):
        tops = RISING["abc".index(start), :, images // 10].mean(axis=1)
        assert rows["top1"].to_numpy() == pytest.approx(tops)
        assert rows["mean"].to_numpy() == pytest.approx(tops.mean())
        assert rows["mean"].between(rows["low"], rows["high"]).all()
        assert rows["low"].nunique() == 1
    assert table.attrs["caption"] == "as made"


def test_top_1_at_the_end_and_how_soon_a_level_is_reached():
    table = measure.learned(trainings_of(RISING), level=0.5).set_index("start")
    final = RISING[:, :, -1].mean(axis=2)
    for column, of_seeds in (("top1", np.mean), ("worst", np.min), ("best", np.max)):
        assert table[column].to_numpy() == pytest.approx(of_seeds(final, axis=1))
    low, images, high = table.loc["a", ["images_low", "images", "images_high"]]
    assert low <= images == pytest.approx(10, abs=1.5)
    assert images <= high
    assert not table.loc["b", "images"] <= 18
    assert (table["macs"] == 5).all()
    never = measure.learned(trainings_of(RISING), level=0.99)
    assert never["images"].isna().all()
    assert np.isinf(never["images_high"]).all()
    slowest = measure.learned(trainings_of(RISING)).set_index("start")
    assert slowest["level"].iloc[0] == pytest.approx(final.mean(axis=1).min())
    assert slowest["images"].notna().all()
    trained = trainings_of(np.arange(10) < np.array([0, 4, 8])[None, None, :, None])
    for level, images in {0.6: 15, 0.0: 0}.items():
        found = measure.learned(trained, level=level)["images"].item()
        assert found == pytest.approx(images)


def test_a_start_beats_another_where_the_interval_says_so():
    pairs = measure.which_beats_which(trainings_of(RISING))
    table = pairs.set_index(["start_a", "start_b"])
    assert len(table) == 9
    assert {pair for pair, beats in table["beats"].items() if beats} == {("a", "b"), ("a", "c")}
    final = RISING[:, :, -1].mean(axis=(1, 2))
    for (a, b), row in table.iterrows():
        back = table.loc[(b, a)]
        assert row["difference"] == pytest.approx(final["abc".index(a)] - final["abc".index(b)])
        assert row["low"] == pytest.approx(-back["high"])
        assert a != b or row["low"] == row["high"] == 0
    assert measure.beats_all(pairs, "a", ["b", "c"]) is True
    assert measure.beats_all(pairs, "b", ["a", "c"]) is False
    assert measure.beats_all(pairs, "b", ["c"]) is None


def test_a_difference_on_the_same_images_is_surer_than_each_value():
    right = drawn([[0.1, 0.2, 0.6]], seeds=1)
    better = right.copy()
    better[0, :, -1, :20] = True  # right wherever the other is, and of twenty images besides
    trained = trainings_of(np.concatenate([better, right]))
    ends = measure.learned(trained).set_index("start")
    assert ends.loc["a", "low"] < ends.loc["b", "high"]
    pairs = measure.which_beats_which(trained)
    assert pairs.query("start_a == 'a' and start_b == 'b'")["beats"].item()


@pytest.mark.parametrize("seeds", [2, 5])
def test_few_seeds_have_their_whole_variance(seeds):
    """Where seeds alone differ, the interval is that of the mean of as many seeds."""
    rng, widths, spreads = np.random.default_rng(1), [], []
    for _ in range(40):
        tops = rng.integers(60, 140, size=seeds)
        right = np.zeros((1, seeds, 3, 200), bool)
        right[0, :, -1] = np.arange(200) < tops[:, None]
        draws = draw_curves(trainings_of(right), 200)[:, 0, -1]
        share = tops.mean() / 200
        widths.append(draws.var() - share * (1 - share) / 200)
        spreads.append((tops / 200).var(ddof=1) / seeds)
    assert np.mean(widths) == pytest.approx(np.mean(spreads), rel=0.25)
