from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed, with_one_expert, with_random_centres
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.recipes import RECIPES, recipe_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.variants import SCORES
from tests.helpers.images import toy_images
from tests.helpers.models import same_models, toy_vit
from tests.helpers.runs import CLUSTERING, MEANS, best

DENSE = toy_vit()
CALIBRATION, IMAGES = toy_images(12), toy_images(40).take(range(24, 40))
BOOTSTRAP = {"seed": 2, "resamples": 20}
WHOLE = best(macs_reduction=0.1, tokens_per_image=17, cluster_tokens=200)
DIFFERENT = [p for p, own in RECIPES["best"].pieces.items() if own != RECIPES["paper"].pieces[p]]
CONTROLS = {"static pruning", "random routing", "random centres"}
NUMBERS = [*SCORES, "kl_low", "kl_high", "macs_reduction", "params_reduction", "router_macs"]


@pytest.fixture(scope="module", autouse=True)
def _no_umap():
    """The paper's clusters, without what takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES["paper"].pieces, "clustering", CLUSTERING)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def table(store):
    return measure.ablation(DENSE, CALIBRATION, IMAGES, WHOLE, store=store, **BOOTSTRAP)


@pytest.fixture
def model_of(store):
    """What a configuration makes of the dense model."""
    return lambda config: extract(DENSE, CALIBRATION, config, store=store).model


def paper(**pieces):
    """The paper's recipe with everything else as in ``WHOLE``."""
    return replace(WHOLE, **{"recipe": "paper", "clustering": None, **pieces})


def assert_same(row, model, store):
    """The numbers of a row are those of a model, evaluated by itself."""
    alone = measure.variants(DENSE, CALIBRATION, IMAGES, {"": model}, store=store, **BOOTSTRAP)
    for name in NUMBERS:
        assert row[name] == pytest.approx(alone.iloc[0][name], rel=1e-5, abs=1e-6), name


def test_every_piece_has_two_rows_and_every_recipe_its_controls(table):
    for direction in ("off in turn", "on alone"):
        assert list(table.loc[table["direction"] == direction, "piece"]) == DIFFERENT
    for recipe in ("best", "paper"):
        own = table[table["recipe"] == recipe]
        assert set(own.loc[own["direction"] == "control", "value"]) == CONTROLS
        whole = own[own["direction"] == "as it is"]
        assert whole[["kl_change", "kl_change_low", "kl_change_high"]].values.tolist() == [[0] * 3]
        assert list(own["kl_change"]) == pytest.approx(own["kl"] - whole["kl"].item(), abs=1e-6)
        assert (own["kl_change_low"] <= own["kl_change_high"]).all()
    assert list(table.loc[table["direction"] == "another seed", "value"]) == ["1", "2"]
    assert len(table) == 1 + 2 * (1 + len(DIFFERENT) + len(CONTROLS)) + 2
    assert table["variant"].is_unique
    assert not table["reason"].any()
    dense = table.iloc[0]
    assert (dense["variant"], dense["value"], dense["recipe"]) == ("dense", "dense", "")
    assert dense["retention"] == dense["agreement"] == 1
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["macs_reduction"] == dense["params_reduction"] == 0
    assert dense[["kl_change", "kl_change_low"]].isna().all()


def cases():
    """Recipe, piece and value of a row, and the configuration it stands for."""
    yield "best", "", "", WHOLE
    yield "paper", "", "", paper()
    yield "best", "seed", "2", replace(WHOLE, seed=2)
    for piece in DIFFERENT:
        theirs, own = RECIPES["paper"].pieces[piece], RECIPES["best"].pieces[piece]
        if piece == "clustering":
            yield "best", piece, "HDBSCAN of hidden", replace(WHOLE, clustering=CLUSTERING)
            yield "paper", piece, "k-means of inputs", paper(clustering=MEANS)
        else:
            yield "best", piece, theirs, replace(WHOLE, **{piece: theirs})
            yield "paper", piece, own, paper(**{piece: own})
    counted = replace(CLUSTERING, method="random", count=MEANS.count)
    yield "best", "clustering", "random centres", with_random_centres(WHOLE)
    yield "paper", "clustering", "random centres", paper(clustering=counted)
    for recipe, config in {"best": WHOLE, "paper": paper()}.items():
        yield recipe, "experts", "static pruning", with_one_expert(config)


def test_a_row_is_the_recipe_with_one_piece_changed(table, store, model_of):
    for recipe, piece, value, config in cases():
        keys = {"recipe": recipe, "piece": piece, "value": value}
        rows = table[(table[list(keys)] == pd.Series(keys)).all(axis=1)]
        assert len(rows) == 1, keys
        assert_same(rows.iloc[0], model_of(config), store)
        if not piece:
            assert rows["macs_reduction"].item() == pytest.approx(0.1, abs=0.02)
            rows = table[(table["recipe"] == recipe) & (table["value"] == "random routing")]
            random = randomly_routed(model_of(config), seed=BOOTSTRAP["seed"])
            assert_same(rows.iloc[0], random, store)
    assert "best, clustering: HDBSCAN of hidden" in set(table["variant"])


def test_all_pieces_off_are_the_paper_and_all_on_are_the_best(model_of):
    off = replace(WHOLE, **recipe_named("paper"))
    on = paper(**{**recipe_named("best"), "clustering": MEANS})
    assert same_models(model_of(off), model_of(paper()))
    assert same_models(model_of(on), model_of(WHOLE))


def test_pieces_that_the_recipes_share_are_left_out(store):
    shared = {p: RECIPES["paper"].pieces[p] for p in DIFFERENT if p not in ("router", "clustering")}
    table = measure.ablation(
        DENSE, CALIBRATION, IMAGES, replace(WHOLE, **shared), store=store, repeats=0, resamples=2
    )
    assert set(table["piece"]) == {"", "router", "clustering", "experts"}
    assert "another seed" not in set(table["direction"])


def test_what_the_recipes_cannot_have_is_refused(store):
    with pytest.raises(MoeeError, match="two recipes; found 'best' twice"):
        measure.ablation(DENSE, CALIBRATION, IMAGES, WHOLE, store=store, other="best")
    bound = replace(WHOLE, params_reduction=0.1)
    with pytest.raises(MoeeError, match="bind only the MACs"):
        measure.ablation(DENSE, CALIBRATION, IMAGES, bound, store=store)


FEW, MANY = replace(WHOLE, clustering=replace(MEANS, count=2)), WHOLE
ONE = with_one_expert(WHOLE)


@pytest.fixture(scope="module")
def swept(store):
    tried = {
        "MoEE": {"experts": {2: FEW, 4: MANY}, "model": {"two\nwords": DENSE}},
        "static": {"experts": {None: ONE}, "model": {3: ONE}},
    }
    return measure.sweeps(DENSE, CALIBRATION, IMAGES, tried, store=store, beside=MANY, **BOOTSTRAP)


def test_a_row_for_every_setting_of_every_sweep(swept, store, model_of):
    told = swept[["variant", "system", "sweep", "setting", "recipe"]].itertuples(index=False)
    assert [tuple(row) for row in told] == [
        ("experts: 2", "MoEE", "experts", 2, "best"),
        ("experts: 4", "MoEE", "experts", 4, "best"),
        ("model: two words", "MoEE", "model", "two\nwords", ""),
        ("experts: static", "static", "experts", None, "best"),
        ("model: 3, static", "static", "model", 3, "best"),
    ]
    for place, config in enumerate([FEW, MANY, None, ONE, ONE]):
        assert_same(swept.iloc[place], DENSE if config is None else model_of(config), store)
    changes = swept["kl"] - swept["kl"].iloc[1]
    assert list(swept["kl_change"]) == pytest.approx(list(changes), abs=1e-6)
    assert swept["kl_change"].iloc[1] == 0


def test_tables_of_pieces_and_sweeps_stand_together(table, swept):
    both = pd.concat([table, swept], ignore_index=True)
    assert both["direction"].notna().sum() == len(table)
    assert both["sweep"].notna().sum() == len(swept)
    assert both.attrs == table.attrs
    assert both["kl"].notna().all()


def test_sweeps_are_compared_with_nothing_or_with_one_of_them(store):
    tried = {"MoEE": {"model": {1: DENSE}}}
    table = measure.sweeps(DENSE, CALIBRATION, IMAGES, tried, store=store, resamples=2)
    assert table["kl_change"].isna().all()
    with pytest.raises(MoeeError, match="a variant that is tried"):
        measure.sweeps(DENSE, CALIBRATION, IMAGES, tried, store=store, beside=MANY)
    with pytest.raises(MoeeError, match="at least one variant"):
        measure.sweeps(DENSE, CALIBRATION, IMAGES, {}, store=store)
