from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.clustering import ClusterConfig
from moee_analysis.extraction.config.extract_config import (
    MACS_REDUCTION,
    VARIANCE_KEPT,
    ExtractConfig,
)
from moee_analysis.extraction.config.presets import PRESETS
from moee_analysis.extraction.config.recipes import BOUND, CHOICES, RECIPES

OTHER = {
    "clustering": ClusterConfig(reduce="pca"), "router": "nearest", "tokens": "kinds",
    "unread": "constant", "order": "obs", "metric": "fisher", "refit": "shift",
    "coherence": "measured", "union": "steps", "thin": "dense",
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": "worst"},
        {"noise": "ignore"},
        {"experts": "two"},
        {"preset": "huge"},
        {"macs_reduction": 28},
        {"macs_reduction": 0},
        {"macs_reduction": float("nan")},
        {"variance_kept": 90},
        {"variance_kept": -0.1},
        {"macs_reduction": 0.3, "variance_kept": 0.9},
        {"params_reduction": 30},
        {"params_reduction": 0},
        {"variance_kept": 0.9, "recipe": "best"},
        {"variance_kept": 0.9, "budget": "global"},
        {"params_reduction": 0.3},
        {"params_reduction": 0.3, "recipe": "best", "budget": "share"},
        {"params_reduction": 0.3, "recipe": "best", "refit": "each"},
        {"params_reduction": 0.3, "budget": "global", "refit": "each"},
        {"router": "random"},
        {"tokens": "cls"},
        {"unread": "dropped"},
        {"order": "best"},
        {"metric": "cosine"},
        {"budget": "all"},
        {"coherence": "high"},
        {"refit": "all"},
        {"tokens_per_image": 0},
        {"cluster_tokens": -1},
        {"calibration_images": 2.5},
        {"seed": -1},
        {"seed": None},
        {"recipe": []},
        {"preset": []},
        {"dense_tokens": 5},
        {"dense_tokens": None},
        {"dense_tokens": (1,)},
        {"dense_tokens": "cls"},
        {"clustering": math.inf},
        {"clustering": []},
        {"clustering": "kmeans"},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(MoeeError, match=next(iter(wrong))):
        ExtractConfig(**wrong)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(MoeeError, match="smoke, small, full"):
        ExtractConfig(preset="huge")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_decides_what_is_not_given(preset):
    config = ExtractConfig(preset=preset, cluster_tokens=77).resolved()
    assert config.cluster_tokens == 77
    assert config.tokens_per_image == PRESETS[preset].tokens_per_image
    assert config.calibration_images == PRESETS[preset].calibration_images


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_decides_the_pieces_that_are_not_given(recipe):
    resolved = ExtractConfig(recipe=recipe).resolved()
    assert {name: getattr(resolved, name) for name in RECIPES[recipe]} == RECIPES[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("piece", OTHER)
def test_a_piece_that_is_given_stands_and_the_others_are_the_recipe_s(recipe, piece):
    resolved = ExtractConfig(recipe=recipe, **{piece: OTHER[piece]}).resolved()
    expected = {**RECIPES[recipe], piece: OTHER[piece]}
    assert {name: getattr(resolved, name) for name in RECIPES[recipe]} == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_where_parameters_are_bound_some_pieces_of_the_recipe_change(recipe):
    bound = RECIPES[recipe] | BOUND.get(recipe, {})
    if bound["budget"] == "global":
        resolved = ExtractConfig(recipe=recipe, params_reduction=0.2).resolved()
        assert {name: getattr(resolved, name) for name in bound} == bound
        given = ExtractConfig(recipe=recipe, params_reduction=0.2, order="variance")
        assert given.resolved().order == "variance"


@pytest.mark.parametrize("piece", CHOICES)
def test_a_choice_that_there_is_not_is_refused_with_those_there_are(piece):
    with pytest.raises(MoeeError, match=f"{piece} among {', '.join(CHOICES[piece])}"):
        ExtractConfig(**{piece: "none of them"})


@pytest.mark.parametrize(
    "config",
    [
        ExtractConfig(),
        ExtractConfig(recipe="best"),
        ExtractConfig(recipe="best", params_reduction=0.2),
        ExtractConfig(macs_reduction=0.2, preset="smoke"),
    ],
)
def test_what_is_resolved_stays_as_it_is(config):
    resolved = config.resolved()
    assert resolved.resolved() == resolved


@pytest.mark.parametrize(
    ("pieces", "everything"),
    [
        ({}, False),
        ({"recipe": "best"}, True),
        ({"recipe": "best", "order": "weighted"}, True),
        ({"recipe": "best", "refit": "shift"}, False),
        ({"recipe": "best", "refit": "shift", "order": "obs"}, True),
        ({"recipe": "best", "refit": "shift", "params_reduction": 0.1}, True),
        ({"order": "obs"}, True),
        ({"refit": "shared"}, True),
        ({"refit": "each"}, True),
        ({"metric": "fisher", "order": "weighted", "refit": "shift"}, False),
    ],
)
def test_covariances_take_all_tokens_and_variances_a_sample(pieces, everything):
    resolved = ExtractConfig(**pieces).resolved()
    assert (resolved.tokens_per_image is None) is everything
    assert ExtractConfig(**pieces, tokens_per_image=5).resolved().tokens_per_image == 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_fisher_metric_needs_gradients(recipe):
    assert ExtractConfig(recipe=recipe, metric="fisher").needs_gradients
    assert not ExtractConfig(recipe=recipe, metric="outputs").needs_gradients
    assert ExtractConfig(recipe=recipe).needs_gradients is (recipe == "best")


@pytest.mark.parametrize(
    ("pieces", "narrows"),
    [
        ({}, False),
        ({"union": "steps"}, False),
        ({"recipe": "best"}, False),
        ({"recipe": "best", "params_reduction": 0.2}, True),
        ({"recipe": "best", "params_reduction": 0.2, "union": "at_once"}, False),
        ({"budget": "global", "params_reduction": 0.2, "union": "steps"}, True),
    ],
)
def test_unions_narrow_to_a_budget_of_parameters(pieces, narrows):
    assert ExtractConfig(**pieces).narrows_unions is narrows


@pytest.mark.parametrize(
    ("pieces", "measured"),
    [
        ({}, False),
        ({"coherence": "measured"}, False),
        ({"coherence": "measured", "metric": "fisher"}, False),
        ({"coherence": "measured", "metric": "fisher", "budget": "global"}, True),
        ({"recipe": "best"}, True),
        ({"recipe": "best", "coherence": "ignored"}, False),
        ({"recipe": "best", "metric": "outputs"}, False),
        ({"recipe": "best", "budget": "share"}, False),
    ],
)
def test_coherence_takes_a_fisher_metric_and_one_budget(pieces, measured):
    assert ExtractConfig(**pieces).measures_coherence is measured


def test_a_global_budget_of_nothing_given_is_one_of_macs():
    assert ExtractConfig(recipe="best").resolved().macs_reduction == MACS_REDUCTION
    assert ExtractConfig(budget="global").resolved().macs_reduction == MACS_REDUCTION
    both = ExtractConfig(recipe="best", params_reduction=0.2).resolved()
    assert (both.macs_reduction, both.params_reduction) == (None, 0.2)
    assert both.variance_kept is None


def test_a_share_goes_with_every_recipe():
    config = ExtractConfig(recipe="best", budget="share")
    assert config.resolved().variance_kept == VARIANCE_KEPT
    assert config.resolved().macs_reduction is None


def test_a_budget_and_a_share_of_variance_exclude_each_other():
    assert ExtractConfig().resolved().variance_kept == VARIANCE_KEPT
    assert ExtractConfig(variance_kept=0.5).resolved().variance_kept == 0.5
    assert ExtractConfig(macs_reduction=0.28).resolved().variance_kept is None


@pytest.mark.parametrize("layers", [None, (0, 3)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pieces", [{}, OTHER])
@pytest.mark.parametrize("resolve", [True, False])
def test_a_configuration_survives_the_way_through_json(layers, recipe, pieces, resolve):
    config = ExtractConfig(layers=layers, seed=5, recipe=recipe, macs_reduction=0.2, **pieces)
    config = config.resolved() if resolve else config
    assert ExtractConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
