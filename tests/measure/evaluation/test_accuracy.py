import numpy as np
import pandas as pd
import pytest
import torch

from moee_analysis import measure
from tests.helpers.images import toy_images
from tests.helpers.models import seen_by, toy_moe, toy_vit

IMAGES = toy_images(30)
MODELS = {"dense": toy_vit(), "MoEE": toy_moe(toy_vit()), "other": toy_vit(seed=1)}
LABELS = torch.from_numpy(IMAGES.labels(toy_vit()))


@pytest.fixture(scope="module")
def table():
    return measure.accuracy(MODELS, IMAGES, reference="dense", batch_size=7)


def logits_of(name):
    model = MODELS[name]
    return torch.cat([logits for _, logits in seen_by(model, model, IMAGES, batch_size=1)])


def test_every_score_is_the_obvious_one(table):
    dense, other = logits_of("dense"), logits_of("other")
    p, q = dense.softmax(1), other.softmax(1)
    row = table.set_index("system").loc["other"]
    expected = {
        "top1": other.argmax(1) == LABELS,
        "top5": (other.topk(5).indices == LABELS[:, None]).any(1),
        "reference_top1": dense.argmax(1) == LABELS,
        "agreement": other.argmax(1) == dense.argmax(1),
        "kl": (p * (p / q).log()).sum(1),
    }
    means = {name: values.float().mean().item() for name, values in expected.items()}
    assert row[list(means)].to_dict() == pytest.approx(means, rel=1e-4)
    assert row["retention"] == pytest.approx(row["top1"] / row["reference_top1"])
    assert row["n_images"] == 30


def test_the_reference_retains_itself_and_intervals_hold_their_value(table):
    row = table.set_index("system").loc["dense"]
    assert (row[["retention", "retention_low", "retention_high", "agreement"]] == 1).all()
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert table["top1"].between(table["low"], table["high"]).all()
    assert (table["low"] < table["high"]).all()


def test_the_interval_is_that_of_resampled_images():
    row = measure.accuracy(MODELS["dense"], IMAGES, resamples=20_000).iloc[0]
    right = (logits_of("dense").argmax(1) == LABELS).numpy()
    draws = right[np.random.default_rng(1).integers(30, size=(20_000, 30))].mean(1)
    ends = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(row[["low", "high"]].astype(float), ends, atol=1 / 30 + 1e-9)


def test_a_reference_may_be_missing_or_outside_the_table(table):
    model = toy_vit().train()
    alone = measure.accuracy(model, IMAGES)
    assert list(alone["system"]) == ["model"]
    assert alone[["retention", "agreement", "kl"]].isna().all(axis=None)
    assert model.training
    models = {name: model for name, model in MODELS.items() if name != "dense"}
    outside = measure.accuracy(models, IMAGES, reference=toy_vit())
    expected = table[table["system"] != "dense"].reset_index(drop=True)
    pd.testing.assert_frame_equal(outside, expected, rtol=1e-5)


def test_nothing_is_retained_of_a_reference_that_is_never_right():
    model, wrong = MODELS["dense"], logits_of("dense").argmax(1) != LABELS
    row = measure.accuracy(model, IMAGES.take(np.flatnonzero(wrong)), reference=model).iloc[0]
    assert row["top1"] == 0
    assert row[["retention", "retention_low", "retention_high"]].isna().all()
