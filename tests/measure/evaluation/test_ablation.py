from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed, with_random_centres
from moee_analysis.extraction.config import RECIPES, recipe_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.variants import SCORES
from tests.helpers.images import toy_images
from tests.helpers.models import same_models, toy_vit
from tests.helpers.runs import CLUSTERING, MEANS, best

DENSE = toy_vit()
CALIBRATION, IMAGES = toy_images(12), toy_images(40).take(range(24, 40))
BOOTSTRAP = {"seed": 2, "resamples": 20}
BEST, PAPER = RECIPES["best"], RECIPES["paper"]
FULL = best(macs_reduction=0.1, tokens_per_image=17, cluster_tokens=200)
WHOLE = replace(FULL, **{piece: PAPER[piece] for piece in ("tokens", "metric", "coherence")})
PIECES = [piece for piece, own in BEST.items() if own != PAPER[piece]]
DIFFERENT = [piece for piece in PIECES if getattr(WHOLE, piece) != PAPER[piece]]
FEW, ONE = replace(WHOLE, clustering=replace(MEANS, count=2)), replace(WHOLE, experts="one")
CONTROLS = {"static pruning", "random routing", "random centres"}
NUMBERS = [*SCORES, "kl_low", "kl_high", "macs_reduction", "params_reduction", "router_macs"]


@pytest.fixture(scope="module", autouse=True)
def _no_umap():
    """The paper's clusters, without what takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PAPER, "clustering", CLUSTERING)
        yield


@pytest.fixture(scope="module")
def table(store):
    return measure.ablation(DENSE, CALIBRATION, IMAGES, WHOLE, store=store, **BOOTSTRAP)


@pytest.fixture
def model_of(store):
    return lambda config: extract(DENSE, CALIBRATION, config, store=store).model


def paper(**pieces):
    """The paper's recipe with everything else as in ``WHOLE``."""
    return replace(WHOLE, **{"recipe": "paper", "clustering": None} | pieces)


def assert_same(rows, models, store):
    """The numbers of rows are those of models, evaluated by themselves."""
    tried = dict(enumerate(models))
    alone = measure.variants(DENSE, CALIBRATION, IMAGES, tried, store=store, **BOOTSTRAP)
    pd.testing.assert_frame_equal(
        rows[NUMBERS].reset_index(drop=True), alone[NUMBERS], check_flags=False, atol=1e-6
    )


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
        assert whole["macs_reduction"].item() == pytest.approx(0.1, abs=0.02)
    assert list(table.loc[table["direction"] == "another seed", "value"]) == ["1", "2"]
    assert len(table) == 1 + 2 * (1 + len(DIFFERENT) + len(CONTROLS)) + 2
    assert table["variant"].is_unique
    assert not table["reason"].any()
    dense = table.iloc[0]
    assert dense[["variant", "value", "recipe"]].tolist() == ["dense", "dense", ""]
    numbers = dense[["retention", "agreement", "kl", "macs_reduction", "params_reduction"]]
    assert numbers.tolist() == pytest.approx([1, 1, 0, 0, 0], abs=1e-6)
    assert dense[["kl_change", "kl_change_low"]].isna().all()


def configurations():
    """Recipe, piece and value of a row, and the configuration it stands for."""
    yield "best", "", "", WHOLE
    yield "paper", "", "", paper()
    yield "best", "seed", "2", replace(WHOLE, seed=2)
    yield "best", "clustering", "HDBSCAN of hidden", replace(WHOLE, clustering=CLUSTERING)
    yield "paper", "clustering", "k-means of inputs", paper(clustering=MEANS)
    for piece in set(DIFFERENT) - {"clustering"}:
        yield "best", piece, PAPER[piece], replace(WHOLE, **{piece: PAPER[piece]})
        yield "paper", piece, BEST[piece], paper(**{piece: BEST[piece]})
    counted = replace(CLUSTERING, method="random", count=MEANS.count)
    yield "best", "clustering", "random centres", with_random_centres(WHOLE)
    yield "paper", "clustering", "random centres", paper(clustering=counted)
    yield "best", "experts", "static pruning", ONE
    yield "paper", "experts", "static pruning", replace(paper(), experts="one")


def test_a_row_is_the_recipe_with_one_piece_changed(table, store, model_of):
    *places, configs = zip(*configurations(), strict=True)
    random = [randomly_routed(model_of(c), seed=BOOTSTRAP["seed"]) for c in (WHOLE, paper())]
    keys = [*zip(*places, strict=True)]
    keys += [(recipe, "router", "random routing") for recipe in ("best", "paper")]
    rows = table.set_index(["recipe", "piece", "value"]).loc[keys]
    assert len(rows) == len(keys)
    assert_same(rows, [*configs, *random], store)
    assert "best, clustering: HDBSCAN of hidden" in set(table["variant"])


def test_all_pieces_off_are_the_paper_and_all_on_are_the_best(model_of):
    off = replace(FULL, **recipe_named("paper"))
    on = paper(**recipe_named("best") | {"clustering": MEANS})
    assert same_models(model_of(off), model_of(paper()))
    assert same_models(model_of(on), model_of(FULL))


def test_every_piece_that_differs_is_turned(store):
    config = replace(FULL, layers=(7,))  # of no layer: nothing is made
    table = measure.ablation(DENSE, CALIBRATION, IMAGES, config, store=store, repeats=0)
    for direction in ("off in turn", "on alone"):
        assert list(table.loc[table["direction"] == direction, "piece"]) == PIECES
    assert "another seed" not in set(table["direction"])


def test_a_row_for_every_setting_of_every_sweep(table, store, model_of):
    tried = {
        "MoEE": {"experts": {2: FEW, 4: WHOLE}, "model": {"two\nwords": DENSE}},
        "static": {"experts": {None: ONE}, "model": {3: ONE}},
    }
    measured = partial(measure.sweeps, DENSE, CALIBRATION, IMAGES)
    swept = measured(tried, store=store, beside=WHOLE, **BOOTSTRAP)
    columns = ["variant", "system", "sweep", "setting", "recipe"]
    assert [*swept[columns].itertuples(index=False, name=None)] == [
        ("experts: 2", "MoEE", "experts", 2, "best"),
        ("experts: 4", "MoEE", "experts", 4, "best"),
        ("model: two words", "MoEE", "model", "two\nwords", ""),
        ("experts: static", "static", "experts", None, "best"),
        ("model: 3, static", "static", "model", 3, "best"),
    ]
    assert_same(swept, [FEW, WHOLE, DENSE, ONE, ONE], store)
    changes = swept["kl"] - swept["kl"].iloc[1]
    assert list(swept["kl_change"]) == pytest.approx(list(changes), abs=1e-6)
    assert swept["kl_change"].iloc[1] == 0
    both = pd.concat([table, swept], ignore_index=True)
    assert both[["direction", "sweep"]].notna().sum().tolist() == [len(table), len(swept)]
    assert both.attrs == table.attrs
    alone = measured({"MoEE": {"model": {1: DENSE}}}, store=store, resamples=2)
    assert alone["kl_change"].isna().all()
