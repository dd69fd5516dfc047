from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

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
CALIBRATION, IMAGES = toy_images(24), toy_images(40).take(range(24, 40))
BOOTSTRAP = {"seed": 2, "resamples": 20}
WHOLE = best(macs_reduction=0.1, tokens_per_image=17, cluster_tokens=200)
SEEDS = 2
DIFFERENT = [p for p, own in RECIPES["best"].items() if own != RECIPES["paper"][p]]
CONTROLS = {"static pruning", "random routing", "random centres"}
NUMBERS = [*SCORES, "kl_low", "kl_high", "macs_reduction", "params_reduction", "router_macs"]


@pytest.fixture(scope="module", autouse=True)
def _no_umap():
    """The paper's clusters, without what takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES["paper"], "clustering", CLUSTERING)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def table(store):
    return measure.ablation(
        DENSE, CALIBRATION, IMAGES, WHOLE, store=store, repeats=SEEDS, **BOOTSTRAP
    )


def paper(**pieces):
    """The paper's recipe with everything else as in ``WHOLE``."""
    return replace(WHOLE, **{"recipe": "paper", "clustering": None, **pieces})


def row_of(table, recipe, value, *, piece=None):
    chosen = (table["recipe"] == recipe) & (table["value"] == value)
    found = table[chosen if piece is None else chosen & (table["piece"] == piece)]
    assert len(found) == 1
    return found.iloc[0]


def assert_same(row, model, store):
    """The numbers of a row are those of a model, evaluated by itself."""
    alone = measure.variants(DENSE, CALIBRATION, IMAGES, {"": model}, store=store, **BOOTSTRAP)
    for name in NUMBERS:
        assert row[name] == pytest.approx(alone.iloc[0][name], rel=1e-5, abs=1e-6), name


def test_every_piece_has_two_rows_and_every_recipe_its_controls(table):
    differ = DIFFERENT
    assert list(table.loc[table["direction"] == "off in turn", "piece"]) == differ
    assert list(table.loc[table["direction"] == "on alone", "piece"]) == differ
    for recipe in ("best", "paper"):
        own = table[table["recipe"] == recipe]
        assert set(own.loc[own["direction"] == "control", "value"]) == CONTROLS
        assert (own["direction"] == "as it is").sum() == 1
    assert list(table.loc[table["direction"] == "another seed", "value"]) == ["1", "2"]
    assert len(table) == 1 + 2 * (1 + len(differ) + len(CONTROLS)) + SEEDS
    assert table["variant"].is_unique
    assert not table["reason"].any()


def test_the_first_row_is_the_dense_model(table):
    row = table.iloc[0]
    assert (row["variant"], row["value"], row["recipe"]) == ("dense", "dense", "")
    assert row["retention"] == row["agreement"] == 1
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["macs_reduction"] == row["params_reduction"] == 0


def test_the_recipes_as_they_are_are_the_recipes(table, store):
    for recipe, config in {"best": WHOLE, "paper": paper()}.items():
        row = row_of(table, recipe, "", piece="")
        assert_same(row, extract(DENSE, CALIBRATION, config, store=store).model, store)
        assert row["macs_reduction"] == pytest.approx(0.1, abs=0.02)


def test_all_pieces_off_are_the_paper_and_all_on_are_the_best(store):
    models = {
        recipe: extract(DENSE, CALIBRATION, config, store=store).model
        for recipe, config in {"best": WHOLE, "paper": paper()}.items()
    }
    off = replace(WHOLE, **recipe_named("paper"))
    on = paper(**{**recipe_named("best"), "clustering": MEANS})
    assert same_models(extract(DENSE, CALIBRATION, off, store=store).model, models["paper"])
    assert same_models(extract(DENSE, CALIBRATION, on, store=store).model, models["best"])


@pytest.mark.parametrize("piece", [p for p in DIFFERENT if p != "clustering"])
def test_a_row_is_the_recipe_with_one_piece_changed(table, store, piece):
    theirs, own = recipe_named("paper")[piece], recipe_named("best")[piece]
    off = extract(DENSE, CALIBRATION, replace(WHOLE, **{piece: theirs}), store=store)
    assert_same(row_of(table, "best", theirs, piece=piece), off.model, store)
    on = extract(DENSE, CALIBRATION, paper(**{piece: own}), store=store)
    assert_same(row_of(table, "paper", own, piece=piece), on.model, store)


def test_clusters_are_named_by_method_and_space(table, store):
    off = replace(WHOLE, clustering=CLUSTERING)
    row = row_of(table, "best", "HDBSCAN of hidden")
    assert_same(row, extract(DENSE, CALIBRATION, off, store=store).model, store)
    assert row["variant"] == "best, clustering: HDBSCAN of hidden"
    on = extract(DENSE, CALIBRATION, paper(clustering=MEANS), store=store)
    assert_same(row_of(table, "paper", "k-means of inputs"), on.model, store)


def test_controls_are_those_of_the_package(table, store):
    for recipe, config in {"best": WHOLE, "paper": paper()}.items():
        run = extract(DENSE, CALIBRATION, config, store=store)
        random = randomly_routed(run, seed=BOOTSTRAP["seed"])
        assert_same(row_of(table, recipe, "random routing"), random, store)
        pruned = extract(DENSE, CALIBRATION, with_one_expert(config), store=store)
        assert_same(row_of(table, recipe, "static pruning"), pruned.model, store)


def test_random_centres_are_as_many_as_the_best_recipe_s_clusters(table, store):
    centres = with_random_centres(WHOLE)
    run = extract(DENSE, CALIBRATION, centres, store=store)
    assert_same(row_of(table, "best", "random centres"), run.model, store)
    counted = replace(CLUSTERING, method="random", count=MEANS.count)
    run = extract(DENSE, CALIBRATION, paper(clustering=counted), store=store)
    assert_same(row_of(table, "paper", "random centres"), run.model, store)


def test_another_seed_draws_everything_anew(table, store):
    run = extract(DENSE, CALIBRATION, replace(WHOLE, seed=2), store=store)
    assert_same(row_of(table, "best", "2"), run.model, store)


def test_changes_are_those_to_the_recipe_as_it_is(table):
    for recipe in ("best", "paper"):
        own = table[table["recipe"] == recipe]
        whole = own[own["direction"] == "as it is"].iloc[0]
        assert whole["kl_change"] == whole["kl_change_low"] == whole["kl_change_high"] == 0
        for row in own.to_dict("records"):
            assert row["kl_change"] == pytest.approx(row["kl"] - whole["kl"], abs=1e-6)
            assert row["kl_change_low"] <= row["kl_change_high"]
    assert table.iloc[0][["kl_change", "kl_change_low"]].isna().all()


def test_coherence_alone_changes_nothing(table):
    alone = row_of(table, "paper", "measured")
    assert alone[["kl_change", "kl_change_low", "kl_change_high"]].tolist() == [0, 0, 0]


def test_pieces_that_the_recipes_share_are_left_out(store):
    config = replace(WHOLE, router="cosine", tokens="alike")
    table = measure.ablation(
        DENSE, CALIBRATION, IMAGES, config, store=store, repeats=0, resamples=2
    )
    assert not {"tokens", "another seed"} & {*table["piece"], *table["direction"]}
    assert set(table.loc[table["piece"] == "router", "value"]) == {"random routing"}


def test_a_recipe_is_not_compared_with_itself(store):
    with pytest.raises(MoeeError, match="two recipes; found 'best' twice"):
        measure.ablation(DENSE, CALIBRATION, IMAGES, WHOLE, store=store, other="best")


def test_what_the_other_recipe_cannot_have_is_refused(store):
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


def test_a_row_for_every_setting_of_every_sweep(swept, store):
    told = swept[["variant", "system", "sweep", "setting", "recipe"]].itertuples(index=False)
    assert [tuple(row) for row in told] == [
        ("experts: 2", "MoEE", "experts", 2, "best"),
        ("experts: 4", "MoEE", "experts", 4, "best"),
        ("model: two words", "MoEE", "model", "two\nwords", ""),
        ("experts: static", "static", "experts", None, "best"),
        ("model: 3, static", "static", "model", 3, "best"),
    ]
    for place, config in enumerate([FEW, MANY, None, ONE, ONE]):
        model = DENSE if config is None else extract(DENSE, CALIBRATION, config, store=store).model
        assert_same(swept.iloc[place], model, store)


def test_sweeps_are_compared_with_one_of_their_variants(swept):
    changes = swept["kl"] - swept["kl"].iloc[1]
    assert list(swept["kl_change"]) == pytest.approx(list(changes), abs=1e-6)
    assert swept["kl_change"].iloc[1] == 0


def test_sweeps_need_nothing_to_compare_with(store):
    table = measure.sweeps(
        DENSE, CALIBRATION, IMAGES, {"MoEE": {"model": {1: DENSE}}}, store=store, resamples=2
    )
    assert table["kl_change"].isna().all()


def test_tables_of_pieces_and_sweeps_stand_together(table, swept):
    both = pd.concat([table, swept], ignore_index=True)
    assert both["direction"].notna().sum() == len(table)
    assert both["sweep"].notna().sum() == len(swept)
    assert both.attrs == table.attrs
    assert not torch.isnan(torch.tensor(both["kl"].to_numpy())).any()


def test_sweeps_of_nothing_and_beside_a_stranger_are_refused(store):
    with pytest.raises(MoeeError, match="at least one variant"):
        measure.sweeps(DENSE, CALIBRATION, IMAGES, {}, store=store)
    tried = {"MoEE": {"experts": {2: FEW}}}
    with pytest.raises(MoeeError, match="a variant that is tried"):
        measure.sweeps(DENSE, CALIBRATION, IMAGES, tried, store=store, beside=MANY)
