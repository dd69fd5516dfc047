from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_vit

IMAGES = toy_images(30)


@pytest.fixture(scope="module")
def table():
    models = {"dense": toy_vit(), "MoEE": toy_moe(toy_vit()), "other": toy_vit(seed=1)}
    return measure.accuracy(models, IMAGES, reference="dense", batch_size=7)


def logits_of(model):
    with torch.no_grad():
        return torch.cat([model(x) for x in IMAGES.batches(model, batch_size=1)])


def test_every_score_is_the_obvious_one(table):
    dense, other = logits_of(toy_vit()), logits_of(toy_vit(seed=1))
    labels = torch.from_numpy(IMAGES.labels(toy_vit()))
    p, q = dense.softmax(1), other.softmax(1)
    row = table.set_index("system").loc["other"]
    assert row["top1"] == pytest.approx((other.argmax(1) == labels).float().mean().item())
    assert row["top5"] == pytest.approx(
        np.mean([labels[i] in other[i].topk(5).indices for i in range(30)])
    )
    assert row["agreement"] == pytest.approx(
        (other.argmax(1) == dense.argmax(1)).float().mean().item()
    )
    assert row["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert row["reference_top1"] == pytest.approx((dense.argmax(1) == labels).float().mean().item())
    assert row["retention"] == pytest.approx(row["top1"] / row["reference_top1"])
    assert row["n_images"] == 30


def test_the_reference_retains_itself_and_intervals_hold_their_value(table):
    row = table.set_index("system").loc["dense"]
    assert row["retention"] == row["retention_low"] == row["retention_high"] == 1
    assert row["agreement"] == 1
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert (table["low"] <= table["top1"]).all()
    assert (table["top1"] <= table["high"]).all()
    assert (table["low"] < table["high"]).all()


def test_the_interval_is_that_of_resampled_images():
    model = toy_vit()
    row = measure.accuracy(model, IMAGES, resamples=20_000).iloc[0]
    right = logits_of(model).argmax(1).numpy() == IMAGES.labels(model)
    rng = np.random.default_rng(1)
    draws = right[rng.integers(30, size=(20_000, 30))].mean(1)
    np.testing.assert_allclose(
        (row["low"], row["high"]), np.quantile(draws, [0.025, 0.975]), atol=1 / 30 + 1e-9
    )


def test_a_single_model_needs_no_reference():
    model = toy_vit().train()
    table = measure.accuracy(model, IMAGES)
    assert list(table["system"]) == ["model"]
    assert table[["retention", "agreement", "kl"]].isna().all(axis=None)
    assert model.training


def test_a_reference_outside_the_table_gets_no_row(table):
    models = {"MoEE": toy_moe(toy_vit()), "other": toy_vit(seed=1)}
    outside = measure.accuracy(models, IMAGES, reference=toy_vit())
    expected = table[table["system"] != "dense"].reset_index(drop=True)
    pd.testing.assert_frame_equal(outside, expected, rtol=1e-5)


@pytest.mark.parametrize(("models", "images", "message"), [
    ({"MoEE": toy_vit()}, IMAGES, "among MoEE"),
    ({"dense": toy_vit()}, IMAGES.take([]), "at least one image"),
    ({}, IMAGES, "at least one model"),
])  # fmt: skip
def test_strange_references_and_nothing_to_measure_are_refused(models, images, message):
    with pytest.raises(MoeeError, match=message):
        measure.accuracy(models, images, reference="dense")


def test_nothing_is_retained_of_a_reference_that_is_never_right():
    model = toy_vit()
    wrong = logits_of(model).argmax(1).numpy() != IMAGES.labels(model)
    row = measure.accuracy(model, IMAGES.take(np.flatnonzero(wrong)), reference=model).iloc[0]
    assert row["top1"] == 0
    assert np.isnan([row["retention"], row["retention_low"], row["retention_high"]]).all()
