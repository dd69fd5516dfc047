from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.measure.training.learning_curves import draw_curves
from moee_analysis.measure.training.trainings import Trainings

SEEN = (0, 10, 20)


def trainings_of(right):
    """Trainings that came to ``right`` (starts, seeds, looks, images)."""
    starts, seeds, looks, _ = right.shape
    names = "abcdef"[:starts]
    history = pd.DataFrame(
        {"start": start, "seed": seed, "step": look, "images": SEEN[look], "loss": 1.0,
         "top1": right[place, seed, look].mean()}
        for place, start in enumerate(names) for seed in range(seeds) for look in range(looks)
    )  # fmt: skip
    sizes = pd.DataFrame({"start": list(names), "macs": 5, "params": 7})
    return Trainings(history, right, sizes, {}, "as made")


def drawn(tops, *, seeds=3, images=400, seed=0):
    """Right or wrong by chance, with these top-1 (starts, looks) on average."""
    rng = np.random.default_rng(seed)
    tops = np.asarray(tops)[:, None, :, None]
    return rng.random((len(tops), seeds, tops.shape[2], images)) < tops


RISING = drawn([[0.1, 0.5, 0.9], [0.1, 0.2, 0.5], [0.1, 0.2, 0.5]])


def test_curves_have_the_mean_and_an_interval_of_all_seeds():
    table = measure.learning_curves(trainings_of(RISING))
    assert len(table) == 3 * 3 * 3
    for (start, images), rows in table.groupby(["start", "images"]):
        place = "abc".index(start), slice(None), SEEN.index(images)
        assert rows["mean"].to_numpy() == pytest.approx(RISING[place].mean())
        assert rows["top1"].to_numpy() == pytest.approx(RISING[place].mean(axis=1))
        assert (rows["low"] <= rows["mean"]).all()
        assert (rows["mean"] <= rows["high"]).all()
        assert rows["low"].nunique() == 1
    assert table.attrs["caption"] == "as made"


def test_what_is_learned_and_how_soon():
    table = measure.learned(trainings_of(RISING), level=0.5).set_index("start")
    final = RISING[:, :, -1].mean(axis=2)
    assert table["top1"].to_numpy() == pytest.approx(final.mean(axis=1))
    assert table["worst"].to_numpy() == pytest.approx(final.min(axis=1))
    assert table["best"].to_numpy() == pytest.approx(final.max(axis=1))
    assert table.loc["a", "images"] == pytest.approx(10, abs=1.5)
    assert table.loc["a", "images_low"] <= table.loc["a", "images"] <= table.loc["a", "images_high"]
    assert table.loc["b", "images"] > 18 or math.isnan(table.loc["b", "images"])
    assert (table["macs"] == 5).all()
    never = measure.learned(trainings_of(RISING), level=0.99)
    assert never["images"].isna().all()
    assert np.isinf(never["images_high"]).all()
    slowest = measure.learned(trainings_of(RISING)).set_index("start")
    assert slowest["level"].iloc[0] == pytest.approx(final.mean(axis=1).min())
    assert slowest["images"].notna().all()
    right = np.zeros((1, 1, 3, 10), bool)  # between two looks on a straight line
    right[0, 0, 1, :4], right[0, 0, 2, :8] = True, True
    assert measure.learned(trainings_of(right), level=0.6)["images"].item() == pytest.approx(15)
    assert measure.learned(trainings_of(right), level=0.0)["images"].item() == 0


def test_a_start_beats_another_where_the_interval_says_so():
    table = measure.which_beats_which(trainings_of(RISING)).set_index(["start_a", "start_b"])
    assert len(table) == 9
    final = RISING[:, :, -1].mean(axis=(1, 2))
    assert table.loc[("a", "b"), "difference"] == pytest.approx(final[0] - final[1])
    assert table["beats"].to_dict() == {
        pair: pair in {("a", "b"), ("a", "c")} for pair in table.index
    }
    for one, other in (("a", "b"), ("b", "c")):
        there, back = table.loc[(one, other)], table.loc[(other, one)]
        assert there["low"] == pytest.approx(-back["high"])
        assert there["difference"] == pytest.approx(-back["difference"])
    assert (table.loc[[(n, n) for n in "abc"], ["difference", "low", "high"]] == 0).all(axis=None)
    pairs = table.reset_index()
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
    row = measure.which_beats_which(trained).set_index(["start_a", "start_b"]).loc[("a", "b")]
    assert row["beats"]


@pytest.mark.parametrize("seeds", [2, 5])
def test_few_seeds_have_their_whole_variance(seeds):
    """Where seeds alone differ, the interval is that of the mean of as many seeds."""
    rng = np.random.default_rng(1)
    widths, spreads = [], []
    for _ in range(40):
        right = np.zeros((1, seeds, 3, 200), bool)
        tops = rng.integers(60, 140, size=seeds)
        for seed, top in enumerate(tops):
            right[0, seed, -1, :top] = True
        draws = draw_curves(trainings_of(right), 200)[:, 0, -1]
        of_images = tops.mean() / 200 * (1 - tops.mean() / 200) / 200
        widths.append(draws.var() - of_images)
        spreads.append((tops / 200).var(ddof=1) / seeds)
    assert np.mean(widths) == pytest.approx(np.mean(spreads), rel=0.25)
