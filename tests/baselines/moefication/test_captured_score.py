"""On the bundled model, which is trained: what routers capture, as the original reports it."""

from __future__ import annotations

import pytest
import torch

from moee_analysis.baselines.moefication import (
    GroundTruthRouter,
    MoeficationConfig,
    captured_mass,
    convert,
    oracle_routed,
)
from moee_analysis.baselines.moefication import captured_score as captured
from moee_analysis.baselines.moefication.config import ROUTERS, SCORES
from moee_analysis.data.images import load_images
from moee_analysis.models.loading import find_mlps, load_model
from moee_analysis.moe.layer import moe_layers

TOKENS = 6000


@pytest.fixture(scope="module")
def dense():
    return load_model("bundled")


@pytest.fixture(scope="module")
def images():
    """For calibration, and others."""
    return load_images("bundled", split="calibration").limit(120), load_images("bundled").limit(60)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def made(dense, images, store, **settings):
    settings = {"active": 0.3, "tokens": TOKENS, **settings}
    return convert(dense, images[0], MoeficationConfig(**settings), store=store)


def mass(dense, model, images, store, **settings):
    return captured_mass(dense, model, images[1], tokens=TOKENS, store=store, **settings)


@pytest.fixture(scope="module")
def tables(dense, images, store):
    models = {router: made(dense, images, store, router=router) for router in ROUTERS}
    return {router: mass(dense, model, images, store) for router, model in models.items()}


def test_the_ground_truth_captures_most(tables):
    for router, table in tables.items():
        assert (table["captured"] <= table["best"] + 1e-9).all(), router
        assert (table["best"] == tables["oracle"]["captured"]).all()


def test_the_mlp_router_beats_chance_and_the_constant_choice_and_is_no_worse_than_centres(tables):
    """On images that it was not trained on, in every layer."""
    mlp = tables["mlp"]["captured"]
    assert (mlp > tables["random"]["captured"] + 0.05).all()
    assert (mlp >= tables["constant"]["captured"] - 0.01).all()
    assert (mlp >= tables["centre"]["captured"] - 0.005).all()
    assert mlp.mean() > tables["centre"]["captured"].mean()


def test_chance_captures_as_much_as_it_takes(tables):
    table = tables["random"]
    assert table["captured"].to_numpy() == pytest.approx(table["even"].to_numpy(), abs=0.03)


def test_no_choice_captures_more_than_that_by_the_same_score(dense, images, store):
    models = {s: made(dense, images, store, router="oracle", score=s) for s in SCORES}
    for score in SCORES:
        tables = {s: mass(dense, m, images, store, score=score) for s, m in models.items()}
        assert all(set(table["score"]) == {score} for table in tables.values())
        own = tables[score]["captured"]
        assert all((table["captured"] <= own + 1e-9).all() for table in tables.values())
        assert (own > tables["var" if score != "var" else "pos"]["captured"]).any()


def test_the_table_is_what_a_loop_over_the_model_finds(dense, images, store):
    model = made(dense, images, store, router="centre")
    few, site = images[1].limit(8), find_mlps(dense)[2]
    layer, seen = moe_layers(model)[2], []
    hook = site.module(dense).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in few.batches(dense):
        dense(batch)
    hook.remove()
    inputs = torch.cat(seen).reshape(-1, site.dim)
    scores = GroundTruthRouter(layer, layer.origin, k=1).scores(inputs)
    table = captured_mass(dense, model, few, tokens=10**6).set_index("layer")
    expected = captured(scores, layer.router(inputs))
    assert table.loc[2, "captured"] == pytest.approx(expected, abs=2e-3)
    assert list(table.index) == list(moe_layers(model))
    assert set(table["k"]) <= {layer.router.k for layer in moe_layers(model).values()}


def test_ground_truth_keeps_more_of_the_prediction_than_the_centres(dense, images, store):
    x = torch.cat(list(images[1].batches(dense)))
    centre = made(dense, images, store, router="centre", active=0.5)
    with torch.inference_mode():
        expected, found, best = (m(x) for m in (dense, centre, oracle_routed(centre)))
    assert (best - expected).norm() < (found - expected).norm()
