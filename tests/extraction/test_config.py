import json
import math
from dataclasses import asdict, replace

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import (
    BOUND,
    CHOICES,
    MACS_REDUCTION,
    PRESETS,
    RECIPES,
    VARIANCE_KEPT,
    ClusterConfig,
    ExtractConfig,
    recipe_named,
)

OTHER = {
    "clustering": ClusterConfig(reduce="pca"), "router": "nearest", "tokens": "kinds",
    "unread": "constant", "order": "obs", "metric": "fisher", "refit": "shift",
    "coherence": "measured",
}  # fmt: skip
WRONG = [
    {"recipe": "worst"}, {"preset": "huge"}, {"macs_reduction": 28}, {"macs_reduction": 0},
    {"macs_reduction": float("nan")}, {"variance_kept": 90}, {"variance_kept": -0.1},
    {"macs_reduction": 0.3, "variance_kept": 0.9}, {"params_reduction": 30},
    {"params_reduction": 0}, {"variance_kept": 0.9, "recipe": "best"},
    {"variance_kept": 0.9, "budget": "global"}, {"params_reduction": 0.3},
    {"params_reduction": 0.3, "recipe": "best", "budget": "share"}, {"tokens_per_image": 0},
    {"cluster_tokens": -1}, {"calibration_images": 2.5}, {"seed": -1}, {"seed": None},
    {"recipe": []}, {"preset": []}, {"clustering": math.inf}, {"clustering": []},
    {"clustering": "kmeans"},
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), [
    *((wrong, next(iter(wrong))) for wrong in WRONG),
    ({"preset": "huge"}, "smoke, small, full"),
    *(({piece: "none of them"}, f"{piece} among {', '.join(c)}") for piece, c in CHOICES.items()),
])  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong, words):
    with pytest.raises(MoeeError, match=words):
        ExtractConfig(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_decides_what_is_not_given(preset):
    config, sizes = ExtractConfig(preset=preset, cluster_tokens=77).resolved(), PRESETS[preset]
    assert config.cluster_tokens == 77
    assert config.tokens_per_image == sizes.tokens_per_image
    assert config.calibration_images == sizes.calibration_images


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("given", [{}, *({piece: choice} for piece, choice in OTHER.items())])
def test_a_piece_that_is_given_stands_and_the_others_are_the_recipe_s(recipe, given):
    resolved = ExtractConfig(recipe=recipe, **given).resolved()
    assert (recipe_named(recipe) | given).items() <= vars(resolved).items()


def test_where_parameters_are_bound_some_pieces_of_the_recipe_change():
    bound = ExtractConfig(recipe="best", params_reduction=0.2).resolved()
    assert recipe_named("best", bound=True).items() <= vars(bound).items()
    assert recipe_named("best", bound=True) == recipe_named("best") | BOUND["best"]
    assert replace(bound, order="variance").resolved().order == "variance"


@pytest.mark.parametrize("config", [
    {}, {"recipe": "best"}, {"recipe": "best", "params_reduction": 0.2}, {"macs_reduction": 0.2},
])  # fmt: skip
def test_what_is_resolved_stays_as_it_is(config):
    resolved = ExtractConfig(**config).resolved()
    assert resolved.resolved() == resolved


BEST, SHIFTED = {"recipe": "best"}, {"recipe": "best", "refit": "shift"}
WHOLE = {"coherence": "measured", "metric": "fisher", "budget": "global"}


@pytest.mark.parametrize(("pieces", "everything"), [
    ({}, False), (BEST, True), (BEST | {"order": "weighted"}, True), (SHIFTED, False),
    (SHIFTED | {"order": "obs"}, True), (SHIFTED | {"params_reduction": 0.1}, True),
    ({"order": "obs"}, True), ({"refit": "shared"}, True),
    ({"metric": "fisher", "order": "weighted", "refit": "shift"}, False),
])  # fmt: skip
def test_covariances_take_all_tokens_and_variances_a_sample(pieces, everything):
    resolved = ExtractConfig(**pieces).resolved()
    assert (resolved.tokens_per_image is None) is everything
    assert ExtractConfig(**pieces, tokens_per_image=5).resolved().tokens_per_image == 5


@pytest.mark.parametrize(("pieces", "gradients", "measured"), [
    ({}, False, False), ({"coherence": "measured"}, False, False), (WHOLE, True, True),
    (BEST, True, True), (WHOLE | {"budget": "share"}, True, False),
    (BEST | {"coherence": "ignored"}, True, False), (BEST | {"metric": "outputs"}, False, False),
    (BEST | {"budget": "share"}, True, False), ({"metric": "fisher"}, True, False),
])  # fmt: skip
def test_a_fisher_metric_needs_gradients_and_coherence_that_and_one_budget(
    pieces, gradients, measured
):
    config = ExtractConfig(**pieces)
    assert (config.needs_gradients, config.measures_coherence) == (gradients, measured)


@pytest.mark.parametrize(("given", "macs", "share"), [
    ({"recipe": "best"}, MACS_REDUCTION, None), ({"budget": "global"}, MACS_REDUCTION, None),
    ({"recipe": "best", "params_reduction": 0.2}, None, None),
    ({"recipe": "best", "budget": "share"}, None, VARIANCE_KEPT), ({}, None, VARIANCE_KEPT),
    ({"variance_kept": 0.5}, None, 0.5), ({"macs_reduction": 0.28}, 0.28, None),
])  # fmt: skip
def test_without_a_budget_there_is_one(given, macs, share):
    resolved = ExtractConfig(**given).resolved()
    assert (resolved.macs_reduction, resolved.variance_kept) == (macs, share)
    assert resolved.params_reduction == given.get("params_reduction")


@pytest.mark.parametrize("layers", [None, (0, 3)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pieces", [{}, OTHER])
@pytest.mark.parametrize("resolve", [True, False])
def test_a_configuration_survives_the_way_through_json(layers, recipe, pieces, resolve):
    config = ExtractConfig(layers=layers, seed=5, recipe=recipe, macs_reduction=0.2, **pieces)
    config = config.resolved() if resolve else config
    assert ExtractConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


def earlier(config, *, clustering=(), **changed):
    """A configuration as an earlier version has saved it."""
    content = json.loads(json.dumps(asdict(config.resolved())))
    content |= {"dense_tokens": [], "union": "steps", "thin": "dense"} | changed
    content["clustering"] |= {"metric": "cosine", "selection": "eom"} | dict(clustering)
    return content


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_of_earlier_versions_that_have_no_effect_are_left_out(recipe):
    config = ExtractConfig(recipe=recipe)
    assert ExtractConfig.from_json(earlier(config)) == config.resolved()


@pytest.mark.parametrize(("changed", "found"), [
    ({"refit": "each"}, "refit='each'"), ({"dense_tokens": ["cls"]}, r"dense_tokens=\['cls'\]"),
    ({"clustering": {"metric": "manhattan"}}, "metric='manhattan'"),
    ({"clustering": {"selection": "leaf"}}, "selection='leaf'"),
])  # fmt: skip
def test_settings_that_there_no_longer_are_are_refused_in_one_line(changed, found):
    with pytest.raises(MoeeError, match=f"found {found}.*extract again"):
        ExtractConfig.from_json(earlier(ExtractConfig(), **changed))
