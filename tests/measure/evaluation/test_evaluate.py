import json

import pytest

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.evaluate import evaluate
from moee_analysis.models.macs import count, count_parameters
from tests.helpers.images import toy_images
from tests.helpers.models import seen_by, toy_vit
from tests.helpers.runs import quick

CALIBRATION, IMAGES = toy_images(72).take(range(36, 72)), toy_images(36)
FIELDS = {
    "dense_top1", "moe_top1", "retention", "agreement", "macs_dense", "macs_moe",
    "macs_reduction", "params_dense", "params_moe", "params_reduction", "n_images", "layers",
}  # fmt: skip
LAYER_FIELDS = {
    "experts", "noise_share", "active_fraction", "union_fraction", "converted", "reason",
}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return extract(toy_vit(), CALIBRATION, quick(macs_reduction=0.15))


@pytest.fixture(scope="module")
def numbers(run):
    return evaluate(run, IMAGES)


def test_every_promised_number_is_that_of_the_two_models_as_plain_json(run, numbers):
    assert set(numbers) >= FIELDS
    assert all(set(layer) >= LAYER_FIELDS for layer in numbers["layers"])
    assert json.loads(json.dumps(numbers, allow_nan=False))["n_images"] == 36
    dense, row = run.dense(), measure.accuracy(run.model, IMAGES, reference=run.dense()).iloc[0]
    stored, of_dense = count_parameters(run.model), count_parameters(dense)
    expected = {
        "dense_top1": row["reference_top1"], "moe_top1": row["top1"],
        "agreement": row["agreement"], "retention": row["top1"] / row["reference_top1"],
        "macs_dense": count(dense).total, "params_dense": of_dense, "params_moe": stored,
        "params_reduction": 1 - stored / of_dense,
    }  # fmt: skip
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    # the shares measured on these images differ a little from those of the sampled tokens
    assert numbers["macs_reduction"] == pytest.approx(0.15, abs=0.02)


def test_macs_of_unread_outputs_are_counted_apart(numbers):
    wasted = 16 * 2 * 32 * 64 + 16 * 2 * 32 * (32 + 17)  # MLP and attention of the last block
    assert numbers["macs_unread_dense"] == wasted
    assert 0 < numbers["macs_unread_moe"] <= wasted
    assert numbers["unread_sites"] == ["blocks.2.attn", "blocks.2.mlp"]
    read = {s: numbers[f"macs_{s}"] - numbers[f"macs_unread_{s}"] for s in ("moe", "dense")}
    assert numbers["macs_reduction_read"] == pytest.approx(1 - read["moe"] / read["dense"])


def test_with_everything_kept_the_two_agree_and_retention_of_nothing_is_undefined(run):
    kept = evaluate(extract(toy_vit(), CALIBRATION, quick(variance_kept=1.0)), IMAGES)
    assert kept["agreement"] == kept["retention"] == 1.0
    dense = run.dense()
    ((_, logits),) = seen_by(dense, dense, IMAGES)
    wrong = (logits.argmax(dim=1).numpy() != IMAGES.labels(dense)).nonzero()[0]
    numbers = evaluate(run, IMAGES.take(wrong))
    assert numbers["dense_top1"] == 0
    assert numbers["retention"] is None
    json.dumps(numbers, allow_nan=False)
