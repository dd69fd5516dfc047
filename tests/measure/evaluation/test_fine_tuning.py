import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import statically_pruned
from moee_analysis.extraction.pipeline import extract
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune
from tests.helpers.images import toy_images
from tests.helpers.models import divergence, toy_vit
from tests.helpers.runs import best

CALIBRATION = toy_images(24)
TRAINING, IMAGES = toy_images(40).take(range(24)), toy_images(60).take(range(40, 60))
CONFIG = FinetuneConfig(epochs=1, batch_size=8, learning_rate=1e-5, augmentation="none")
COLUMNS = [
    "system", "budget", "stage", "seed", "top1", "retention", "agreement", "kl", "mean", "low",
    "high", "macs_reduction", "params_reduction", "epoch",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs():
    run = extract(toy_vit(), CALIBRATION, best(macs_reduction=0.3))
    return {"MoEE": [run], "static": [statically_pruned(run, CALIBRATION)]}


@pytest.fixture(scope="module")
def table(runs, store):
    drawn = {"seeds": (0, 4), "resamples": 50}
    return measure.fine_tuning(runs, TRAINING, IMAGES, CONFIG, store=store, **drawn)


def test_scores_before_and_for_every_seed_after_are_those_of_each_model(table, runs, store):
    assert list(table.columns) == COLUMNS
    expected = [("MoEE", "before", 0), ("static", "before", 0)]
    expected += [(s, "after", seed) for s in ("MoEE", "static") for seed in (0, 4)]
    assert list(table[["system", "stage", "seed"]].itertuples(index=False, name=None)) == expected
    run = runs["MoEE"][0]
    tuned = finetune(run, TRAINING, CONFIG, store=store)
    rows = table.query("system == 'MoEE' and seed == 0").set_index("stage")
    for stage, model in (("before", run.model), ("after", tuned.run.model)):
        expected = divergence(run.dense(), model, IMAGES)
        assert rows.loc[stage, "kl"] == pytest.approx(expected, rel=1e-3)
    assert rows.loc["after", "epoch"] == tuned.best


def test_the_seeds_of_a_stage_share_their_mean_and_a_system_its_savings(table):
    for _, rows in table.groupby(["system", "budget", "stage"]):
        assert (rows[["mean", "low", "high"]].nunique() == 1).all()
        assert rows["mean"].iloc[0] == pytest.approx(rows["retention"].mean())
        assert rows["mean"].between(rows["low"] - 1e-9, rows["high"] + 1e-9).all()
    static = table.loc[table["system"] == "static", "macs_reduction"]
    assert np.ptp(static) == pytest.approx(0)
    assert static.iloc[0] == pytest.approx(0.3, abs=0.02)
    assert table.groupby("system")["params_reduction"].nunique().tolist() == [1, 1]
