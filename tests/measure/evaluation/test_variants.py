from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.variants import DIVERGENCES, SCORES
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import divergence, same_models, toy_moe, toy_vit
from tests.helpers.runs import best, quick

DENSE = toy_vit()
CALIBRATION, IMAGES = toy_images(24), toy_images(40).take(range(24, 40))
FEW = quick(macs_reduction=0.1)
MANY = best(macs_reduction=0.1, layers=(0, 2))
IMPOSSIBLE = replace(FEW, layers=(7,))
MADE = toy_moe(toy_vit())
TRIED = {"dense": DENSE, "few": FEW, "none": IMPOSSIBLE, ("many", 3): MANY, "again": FEW, "m": MADE}
BESIDE = {"few": "dense", ("many", 3): "few", "none": "few", "dense": "none", "again": "few"}


def measured(store, tried=TRIED, images=IMAGES, **options):
    table = measure.variants(DENSE, CALIBRATION, images, tried, store=store, **options)
    assert list(table["variant"]) == list(tried)
    return table


@pytest.fixture(scope="module")
def table(store):
    return measured(store, beside=BESIDE, seed=3, resamples=40)


@pytest.fixture(scope="module")
def models(store):
    """The same models, made by hand."""
    configs = {"few": FEW, ("many", 3): MANY}
    made = {k: extract(DENSE, CALIBRATION, c, store=store).model for k, c in configs.items()}
    return {"dense": DENSE, "m": MADE, **made}


def row_of(table, name):
    return table.iloc[list(TRIED).index(name)]


def test_a_row_for_every_variant_with_the_scores_of_accuracy(table, models):
    assert list(table.columns[1:14]) == [*SCORES, *DIVERGENCES]
    assert "16 images" in table.attrs["caption"]
    for name, model in models.items():
        alone = measure.accuracy(model, IMAGES, reference=DENSE, seed=3, resamples=40).iloc[0]
        found = row_of(table, name)[SCORES].astype(float)
        np.testing.assert_allclose(found, alone[SCORES].astype(float), rtol=1e-5, atol=1e-7)
    assert not DENSE.training
    assert same_models(DENSE, toy_vit())


def test_intervals_are_those_of_images_drawn_again_and_changes_are_paired(table, models):
    kl = {
        name: np.array([divergence(DENSE, model, IMAGES.take([i])) for i in range(len(IMAGES))])
        for name, model in models.items()
    }
    rng = np.random.default_rng(3)
    drawn = [rng.integers(len(IMAGES), size=len(IMAGES)) for _ in range(40)]
    numbers = [(name, "kl", values) for name, values in kl.items()]
    for name, column, values in [*numbers, (("many", 3), "kl_change", kl["many", 3] - kl["few"])]:
        ends = np.quantile([values[rows].mean() for rows in drawn], [0.025, 0.975])
        found = row_of(table, name)[[column, f"{column}_low", f"{column}_high"]]
        assert list(found) == pytest.approx([values.mean(), *ends], abs=1e-6)
    assert list(row_of(table, "again")[DIVERGENCES[2:]]) == [0, 0, 0]
    for name in ("m", "none", "dense"):  # nothing to compare with
        assert row_of(table, name)[DIVERGENCES[2:]].isna().all()


def test_costs_are_counted_layer_by_layer(table, models):
    whole, hidden = count(DENSE).total, 2 * 32 * 64
    for name, model in models.items():
        layers = moe_layers(model).values()
        in_routers = 17 * sum(layer.router.macs for layer in layers)
        experts = [2 * 32 * float(layer.shares @ layer.sizes.float()) for layer in layers]
        saved = 17 * (hidden * len(experts) - sum(experts)) - in_routers
        found = row_of(table, name)
        assert found["macs_reduction"] == pytest.approx(saved / whole)
        assert found["router_macs"] == pytest.approx(in_routers / whole)
        stored = count_parameters(model) / count_parameters(DENSE)
        assert found["params_reduction"] == pytest.approx(1 - stored)


def test_reasons_and_seconds_of_the_first_time(table, store):
    row = row_of(table, "none")
    assert "layers between 0 and 2" in row["reason"]
    assert row.drop(["variant", "reason"]).isna().all()
    assert set(table["reason"].drop(list(TRIED).index("none"))) == {""}
    only = measured(store, {"none": IMPOSSIBLE})
    assert only[[*SCORES, *DIVERGENCES]].isna().all(axis=None)
    pd.testing.assert_series_equal(measured(store, resamples=2)["seconds"], table["seconds"])
    assert table["seconds"].notna().tolist() == [False, True, False, True, True, False]
    assert row_of(table, "few")["seconds"] == row_of(table, "again")["seconds"] > 0
