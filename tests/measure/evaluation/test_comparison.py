import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import constantly_routed, oracle_routed, randomly_routed
from moee_analysis.baselines.registry import STATIC, SYSTEMS, Asked, systems_named
from moee_analysis.measure.evaluation import comparison
from moee_analysis.measure.evaluation.comparison import Contest, compare, comparison_table
from moee_analysis.models.macs import count, count_parameters
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.measure.evaluation.test_evaluate import FIELDS, LAYER_FIELDS

MOEFICATION, UPCYCLED = "MoEfication: k-means, centre", "Sparse Upcycling: top-1"
FEW = ["MoEE, best", MOEFICATION, UPCYCLED, STATIC]


@pytest.fixture(scope="module")
def contest(store):
    images = toy_images(60)
    calibration, unseen = images.take(range(36)), images.take(range(36, 60))
    return Contest(toy_vit(), calibration, unseen, "smoke", store, resamples=50, latency=False)


@pytest.fixture(scope="module")
def rows(contest):
    return compare(contest, macs_reductions=[0.2], seeds=(0, 1), systems=FEW)


def row_of(rows, system):
    return next(row for row in rows if row["system"] == system)


def test_a_row_for_every_system_and_seed_with_all_that_evaluate_tells(rows):
    expected = [(name, seed) for seed in (0, 1) for name in systems_named(FEW)]
    assert [(row["system"], row["seed"]) for row in rows] == expected
    for row in rows:
        assert set(row) >= FIELDS | {"system", "controls", "seed"}
        assert all(set(layer) >= LAYER_FIELDS for layer in row["layers"])
    assert len(json.loads(json.dumps(rows, allow_nan=False))) == len(rows)


def test_numbers_are_those_of_the_measures(contest, rows):
    row, make = row_of(rows, "MoEE, best"), SYSTEMS["MoEE, best"].make
    made = make(contest.dense, contest.calibration, Asked(0.2, "smoke"), store=contest.store)
    scores = {
        "own": made.model,
        "random_routing": randomly_routed(made),
        "constant_routing": constantly_routed(made),
        "oracle_routing": oracle_routed(made, contest.dense),
    }
    found = measure.accuracy(scores, contest.images, reference=contest.dense).set_index("system")
    assert row["moe_top1"] == found.loc["own", "top1"]
    assert row["kl"] == pytest.approx(found.loc["own", "kl"], rel=1e-4)
    for kind in scores.keys() - {"own"}:
        assert row["controls"][kind]["top1"] == found.loc[kind, "top1"]
    costs = measure.macs(made, contest.images).set_index("component").loc["total"]
    assert row["macs_moe"] == pytest.approx(costs["macs"])
    assert row["params_moe"] == costs["params"] == count_parameters(made.model)
    assert row["macs_dense"] == count(contest.dense).total
    balance = measure.balance(made, contest.images).query("n_experts > 1")
    means = balance.groupby("metric")["value"].mean()
    assert row["balance"] == pytest.approx(means.to_dict())


def test_macs_are_matched_or_marked_as_impossible(rows):
    for row in rows:
        assert row["reduces_macs"] == (row["system"] != UPCYCLED)
        if row["reduces_macs"]:
            assert row["macs_reduction"] == pytest.approx(0.2, abs=0.02)
        else:
            assert max(row["macs_reduction"], row["params_reduction"]) < 0
            assert row["agreement"] == 1  # the dense model, as it begins


def test_static_pruning_is_beside_every_system(rows):
    static = row_of(rows, STATIC)
    assert {row["controls"]["static_pruning"]["system"] for row in rows} == {STATIC}
    beside = row_of(rows, "MoEE, best")["controls"]["static_pruning"]
    assert beside["retention"] == static["retention"]
    assert static["balance"] is static["controls"]["random_routing"] is None


def test_intervals_over_seeds_hold_the_mean_of_all(rows):
    for name, own in comparison_table(rows).groupby("system"):
        assert own["mean"].nunique() == 1
        assert own["mean"].iloc[0] == pytest.approx(own["retention"].mean())
        assert own["mean"].between(own["low"], own["high"]).all()
        assert row_of(rows, name)["over_seeds"]["low"] == own["low"].iloc[0]


def test_a_budget_out_of_reach_is_a_row_with_its_reason(contest):
    rows = compare(contest, macs_reductions=[0.7], systems=[MOEFICATION])
    assert [row["system"] for row in rows] == [STATIC, MOEFICATION]
    assert all("MACs" in row["reason"] for row in rows)
    assert all(row["retention"] is None and row["over_seeds"] is None for row in rows)
    table = comparison_table(rows)
    assert table["mean"].isna().all()
    assert math.isnan(table["static_pruning"].iloc[0])


def test_models_that_do_not_fit_together_are_measured_apart(contest, rows, monkeypatch):
    monkeypatch.setattr(comparison, "TOGETHER", 1)
    apart = compare(contest, macs_reductions=[0.2], seeds=(0, 1), systems=FEW)
    for one, other in zip(apart, rows, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_latency_is_of_the_first_seed(contest, monkeypatch):
    def timed(models, *_args, **_options):
        return pd.DataFrame([{"system": name, "ms": 2.0, "speed_up": 1.5} for name in models])

    monkeypatch.setattr(comparison, "latency", timed)
    clocked = replace(contest, latency=True)
    rows = compare(clocked, macs_reductions=[0.2], seeds=(0, 1), systems=[STATIC])
    assert [row["latency"] for row in rows] == [{"ms": 2.0, "speed_up": 1.5}, None]
