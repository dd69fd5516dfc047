from dataclasses import replace

import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from tests.helpers.images import toy_images
from tests.helpers.models import toy_swin, toy_vit
from tests.helpers.runs import quick

MODELS = {"ViT": toy_vit(), "Swin": toy_swin()}
CALIBRATION, IMAGES = toy_images(24), toy_images(60).take(range(24, 60))
FEW = {"permutations": 5, "resamples": 5}
CONFIG = quick(macs_reduction=0.1)


def test_quantities_are_those_of_their_measures():
    runs = {name: extract(model, CALIBRATION, CONFIG) for name, model in MODELS.items()}
    table = measure.architectures(runs, IMAGES, **FEW)
    values = table.set_index(["model", "quantity", "layer"])["value"].sort_index()
    for name, run in runs.items():
        assert values[name, "experts"].to_dict() == {r.index: r.experts for r in run.layers}
    routed = measure.routes(runs["Swin"], IMAGES)
    even = measure.balance(routed).query("metric == 'entropy'").set_index("layer")["value"]
    summary = measure.similarity_summary(measure.similarity(runs["Swin"])).set_index("layer")
    known = measure.class_information(routed, **FEW).set_index("layer")["corrected"]
    expected = {"evenness": even, "similarity": summary["mean"], "class": known}
    for quantity, of_layer in expected.items():
        found = values["Swin", quantity].to_dict()
        assert found == pytest.approx(of_layer.to_dict())
    swin = table[table["model"] == "Swin"].drop_duplicates("layer").set_index("layer")
    assert swin["depth"].to_dict() == {0: 0.25, 1: 0.75}
    tokens = swin["tokens"].dropna()
    assert tokens.to_dict() == {layer: {0: 64, 1: 16}[layer] for layer in tokens.index}
    assert swin["dim"].to_dict() == {0: 16, 1: 32}


def test_parts_are_known_where_images_have_masks(bundled_run, bundled_images):
    run = bundled_run(quick(layers=(3,)))
    table = measure.architectures({"bundled": run}, bundled_images["evaluation"], **FEW)
    parts = table[table["quantity"] == "part"]
    assert parts["layer"].tolist() == [3]
    assert parts["chance"].notna().all()


def test_a_model_that_stays_dense_has_no_experts():
    config = quick(clustering=replace(CONFIG.clustering, max_noise=1e-6))
    run = extract(MODELS["ViT"], CALIBRATION, config)
    table = measure.architectures({"dense": run}, IMAGES, **FEW)
    assert set(table["quantity"]) == {"experts"}
    assert (table["value"] == 0).all()


def test_every_model_has_every_variant_and_random_routing_beside_what_is_routed(tmp_path):
    configs = {"paper": CONFIG, "static": replace(CONFIG, experts="one")}
    table = measure.architecture_variants(
        MODELS, CALIBRATION, IMAGES, configs, store=tmp_path, resamples=20
    )
    assert table["model"].tolist() == ["ViT"] * 4 + ["Swin"] * 4
    assert table["variant"].tolist() == ["dense", "paper", "paper, random routing", "static"] * 2
    dense = table[table["variant"] == "dense"]
    assert (dense["retention"].dropna() == 1).all()
    assert (dense["macs_reduction"] == 0).all()
    routed = table[table["variant"] == "paper"]["macs_reduction"]
    assert np.allclose(routed, 0.1, atol=0.02)
