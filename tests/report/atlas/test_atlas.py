import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

from moee_analysis import measure
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import merge_tokens
from moee_analysis.moe.layer import moe_layers
from moee_analysis.report.atlas import write_atlas
from moee_analysis.report.atlas.page import OTHERS, PATCHES, atlas_facts, page
from tests.helpers.images import toy_images
from tests.helpers.models import CLASSES, toy_kinds, toy_moe, toy_swin, toy_vit

NASTY = "</script><script>alert(1)</script>&<b>"


def run_of(model):
    return Extraction(model, ExtractConfig(), None, (), {"model": "toy"})


@pytest.fixture(scope="module")
def run():
    return run_of(toy_kinds(toy_vit()))


@pytest.fixture(scope="module")
def images():
    return toy_images(18)


@pytest.fixture(scope="module")
def facts(run, images):
    return atlas_facts(run, images, dense=toy_vit())


def unpacked(facts, layer, name="routes"):
    shape = (len(facts["images"]), *layer["grid"])
    return np.frombuffer(base64.b64decode(layer[name]), "<u2").reshape(shape)


def test_every_layer_and_expert_is_there_with_its_use(facts, run, images):
    routed = measure.routes(run, images, by_folder=True)
    assert [layer["layer"] for layer in facts["layers"]] == list(routed.placed)
    for layer in facts["layers"]:
        patches = routed.patch_experts(layer["layer"])
        assert (unpacked(facts, layer) == patches).all()
        module = moe_layers(run.model)[layer["layer"]]
        assert layer["hidden"] == module.hidden_dense
        assert [e["neurons"] for e in layer["experts"]] == module.expert_sizes
        for number, expert in enumerate(layer["experts"]):
            own = patches == number
            assert expert["share"] == pytest.approx(own.mean(), abs=1e-4)
            assert expert["images"] == own.any(axis=(1, 2)).sum()
    # leading tokens are counted apart
    for first in (layer["experts"][0] for layer in facts["layers"]):
        assert (first["leading"], first["share"], first["top"]) == (len(images), 0, [])
    # windows are put where they are
    run, images = run_of(toy_moe(toy_swin())), toy_images(6)
    facts, routed = atlas_facts(run, images), measure.routes(run, images)
    assert facts["layers"]
    for layer in facts["layers"]:
        assert (unpacked(facts, layer) == routed.patch_experts(layer["layer"])).all()


def test_patches_that_are_one_token_are_told_where_tokens_merge(facts, images):
    assert not any("tokens" in layer for layer in facts["layers"])
    assert "one outline" not in page(facts)
    model = merge_tokens(toy_kinds(toy_vit()), (0, 4, 4), lambda _: WardCosts(by_importance=False))
    few = images.take(range(4))
    found, places = atlas_facts(run_of(model), few), measure.token_places(model, few)
    for layer in found["layers"]:
        assert (unpacked(found, layer, "tokens") == places[layer["layer"]]).all()
    assert "one outline" in page(found)


def test_patches_classes_and_overlap_are_those_of_the_measures(facts, run, images):
    top = measure.top_patches(run, images, count=PATCHES).set_index(["layer", "expert"])
    shares = measure.class_routing(run, images).set_index(["layer", "expert"])
    jaccard = measure.overlap(run).set_index(["layer", "expert_a", "expert_b"])["jaccard"]
    for layer in facts["layers"]:
        for number, expert in enumerate(layer["experts"]):
            own = [(layer["layer"], number)]
            if expert["top"]:
                expected = top.loc[own, ["image", "row", "column"]].to_numpy().tolist()
                assert [patch[:3] for patch in expert["top"]] == expected
            of = shares.loc[own]
            ahead = of.assign(ahead=of["share"] - of["share_all"]).nlargest(OTHERS, "ahead")
            more = ahead[ahead["ahead"] > 0]
            assert [name for name, *_ in expert["classes"]] == list(more["class_name"])
            assert len(expert["overlap"]) == len(layer["experts"]) - 1
            for other, share, _ in expert["overlap"]:
                assert share == pytest.approx(jaccard.loc[*own[0], other], abs=1e-4)


def test_neighbours_have_the_most_similar_mean_inputs_less_the_common_one(facts, run, images):
    known = measure.typical(run, images)
    for layer in facts["layers"]:
        means = known.means[layer["layer"]]
        centred = means - known.common[layer["layer"]]
        met = set(np.flatnonzero(np.isfinite(means).all(axis=1)))
        for number, expert in enumerate(layer["experts"]):
            cosines = {n: _cosine(centred[number], centred[n]) for n in met - {number}}
            expected = sorted(cosines, key=cosines.get, reverse=True)[:OTHERS]
            assert [other for other, *_ in expert["near"]] == (expected if number in met else [])
            for other, cosine, raw in expert["near"]:
                assert cosine == pytest.approx(cosines[other], abs=1e-3)
                assert raw == pytest.approx(_cosine(means[number], means[other]), abs=1e-3)


def _cosine(one, two):
    return one @ two / np.linalg.norm(one) / np.linalg.norm(two)


def test_pictures_and_predictions_are_of_the_images(facts, images, run):
    for model, name in ((run.model, "moe"), (toy_vit(), "dense")):
        best = torch.cat([model(x).argmax(dim=1) for x in images.batches(model)])
        assert [image[name] for image in facts["images"]] == [CLASSES[n] for n in best]
    for index, image in enumerate(facts["images"]):
        assert image["class"] == images.folders[index]
        shown = Image.open(io.BytesIO(base64.b64decode(image["picture"])))
        assert (np.asarray(shown) == images.as_seen(index, run.model)).all()  # small: no loss


def test_layers_that_are_not_shown_are_named_with_the_reason(small_run, images):
    named = replace(images.take(range(6)), folders=("n01443537",) * 6)
    first, *others = small_run.layers
    last = replace(first, index=9, converted=False, reason="<no>")
    facts = atlas_facts(replace(small_run, layers=(*others, last)), named)
    assert facts["absent"] == "Not shown: layer 9 stayed dense: <no>."
    assert "&lt;no&gt;" in page(facts)
    assert atlas_facts(small_run, named)["absent"] == ""
    assert all("dense" not in image for image in facts["images"])  # no dense model was given
    assert "MACs" not in dict(facts["about"])


def test_parts_are_those_that_an_expert_shows_more_than_others_do():
    images, run = load_images("bundled", limit=8), run_of(toy_moe(toy_vit()))
    profile = measure.part_profile(measure.routes(run, images, by_folder=True), images)
    shares = profile.set_index(["layer", "expert", "part"])["share"]
    told = [
        (share, usual, shares[layer["layer"], number, part])
        for layer in atlas_facts(run, images)["layers"]
        for number, expert in enumerate(layer["experts"])
        for part, share, usual in expert["parts"]
    ]
    assert told
    for share, usual, expected in told:
        assert share == pytest.approx(expected, abs=1e-4)
        assert usual < share


def test_the_page_holds_the_facts_fetches_nothing_and_runs_its_own_script_alone(facts):
    soup = BeautifulSoup(page(facts), "html.parser")
    kept = json.loads(soup.find(id="facts").string)
    assert kept == {"layers": facts["layers"], "images": facts["images"]}
    assert not soup.find_all(["link", "iframe", "object"])
    assert not [tag for tag in soup.find_all(src=True) if not tag["src"].startswith("data:")]
    assert not re.search(r"https?://", page(facts))
    policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for text in (soup.find("style").string, soup.find_all("script")[-1].string):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_names_cannot_become_markup(run):
    named = replace(toy_images(6), name=NASTY, folders=(NASTY,) * 6)
    text = page(atlas_facts(replace(run, provenance={"model": NASTY}), named, dense=toy_vit()))
    soup = BeautifulSoup(text, "html.parser")
    assert len(soup.find_all("script")) == 2
    assert NASTY not in text
    assert NASTY in [dd.get_text() for dd in soup.find_all("dd")]
    kept = json.loads(soup.find(id="facts").string)
    assert {image["class"] for image in kept["images"]} == {NASTY}


def test_the_file_appears_when_it_is_complete(run, images, tmp_path, monkeypatch):
    out = tmp_path / "atlas.html"
    out.write_text("older")
    with pytest.raises(MoeeError, match="at least one image"):
        write_atlas(run, images.take([]), out)
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.html"]
    assert out.read_text() == "older"
    assert write_atlas(run, images.take([0, 1]), out) == out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.html"]
    with pytest.raises(MoeeError, match="routed layers"):
        atlas_facts(run_of(toy_vit()), images)
