from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis import measure, plots
from moee_analysis.baselines.controls import with_one_expert
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.loading import load_model
from tests.helpers.images import toy_images
from tests.helpers.models import toy_swin, toy_vit
from tests.helpers.runs import quick

MODELS = {"ViT": toy_vit(), "Swin": toy_swin()}
CALIBRATION, IMAGES = toy_images(24), toy_images(60).take(range(24, 60))
FEW = {"permutations": 5, "resamples": 5}
CONFIG = quick(macs_reduction=0.1)


@pytest.fixture(scope="module")
def runs():
    return {name: extract(model, CALIBRATION, CONFIG) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def table(runs):
    return measure.architectures(runs, IMAGES, **FEW)


def values(table, model, quantity):
    rows = table[(table["model"] == model) & (table["quantity"] == quantity)]
    return rows.set_index("layer")["value"].to_dict()


def test_quantities_are_those_of_their_measures(table, runs):
    for name, run in runs.items():
        assert values(table, name, "experts") == {r.index: r.experts for r in run.layers}
    run, routed = runs["Swin"], measure.routes(runs["Swin"], IMAGES)
    even = measure.balance(routed)
    even = even[even["metric"] == "entropy"].set_index("layer")["value"]
    assert values(table, "Swin", "evenness") == pytest.approx(even.to_dict())
    cosines = measure.similarity_summary(measure.similarity(run)).set_index("layer")["mean"]
    assert values(table, "Swin", "similarity") == pytest.approx(cosines.to_dict())
    known = measure.class_information(routed, **FEW).set_index("layer")["corrected"]
    assert values(table, "Swin", "class") == pytest.approx(known.to_dict())
    swin = table[table["model"] == "Swin"].drop_duplicates("layer").set_index("layer")
    assert swin["depth"].to_dict() == {0: 0.25, 1: 0.75}
    tokens = swin["tokens"].dropna()
    assert tokens.to_dict() == {layer: {0: 64, 1: 16}[layer] for layer in tokens.index}
    assert swin["dim"].to_dict() == {0: 16, 1: 32}


def test_parts_are_known_where_images_have_masks():
    dense, scenes = load_model(), load_images(limit=40)
    run = extract(dense, load_images(split="calibration", limit=40), quick(layers=(3,)))
    table = measure.architectures({"bundled": run}, scenes, **FEW)
    parts = table[table["quantity"] == "part"]
    assert parts["layer"].tolist() == [3]
    assert parts["chance"].notna().all()


def test_a_model_that_stays_dense_has_no_experts():
    dense = MODELS["ViT"]
    clustering = replace(CONFIG.clustering, max_noise=1e-6)
    run = extract(dense, CALIBRATION, replace(CONFIG, macs_reduction=None, variance_kept=0.9,
                                              clustering=clustering))  # fmt: skip
    table = measure.architectures({"dense": run}, IMAGES, **FEW)
    assert set(table["quantity"]) == {"experts"}
    assert (table["value"] == 0).all()


def test_no_runs_and_no_models_are_refused(tmp_path):
    with pytest.raises(MoeeError, match="a run or more"):
        measure.architectures({}, IMAGES)
    with pytest.raises(MoeeError, match="a model or more"):
        measure.architecture_variants({}, CALIBRATION, IMAGES, {"paper": CONFIG}, store=tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    configs = {"paper": CONFIG, "static": with_one_expert(CONFIG)}
    store = tmp_path_factory.mktemp("store")
    return measure.architecture_variants(
        MODELS, CALIBRATION, IMAGES, configs, store=store, resamples=20
    )


def test_every_model_has_every_variant_and_random_routing_beside_what_is_routed(kept):
    for _, rows in kept.groupby("model"):
        assert rows["variant"].tolist() == ["dense", "paper", "paper, random routing", "static"]
    dense = kept[kept["variant"] == "dense"]
    assert (dense["retention"].dropna() == 1).all()
    assert (dense["macs_reduction"] == 0).all()
    routed = kept[kept["variant"] == "paper"]["macs_reduction"]
    assert np.allclose(routed, 0.1, atol=0.02)


def test_both_tables_can_be_drawn(table, kept):
    fig = plots.architectures(table)
    assert len(fig.axes) == table["quantity"].nunique()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["ViT", "Swin"]
    (ax,) = plots.architecture_variants(kept).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["ViT", "Swin"]
    assert len([line for line in ax.lines if line.get_marker() in "os^D"]) == 3
