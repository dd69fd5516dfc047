import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from moee_analysis import measure
from moee_analysis.measure.knockout import intervention
from moee_analysis.measure.knockout.intervention import alone, knocked_out, removed
from moee_analysis.measure.knockout.knock_out import uses_and_needs
from moee_analysis.models.capture import evaluating
from moee_analysis.moe.layer import moe_layers
from tests.helpers.colours import BLACK, COLOURS, colour_model, coloured_images
from tests.helpers.images import toy_images
from tests.helpers.models import (
    CLASSES,
    SMALL_CONVNEXT,
    hooks_of,
    lively,
    pixels_of,
    same_models,
    toy_kinds,
    toy_moe,
    toy_swin,
    toy_vit,
)

CALIBRATION, IMAGES = toy_images(12), toy_images(36).take(range(12, 36))
OTHERS = coloured_images(*range(100, 104))
FAMILIES = dict(zip(CLASSES, ["insect", "insect", "pet", "pet", "fish", "pet"], strict=True))


def measured(**options):
    options = {"reference": toy_vit(), "families": FAMILIES, "resamples": 50, "seed": 3} | options
    return measure.knock_out(toy_moe(toy_vit()), IMAGES, CALIBRATION, **options)


@pytest.fixture(scope="module")
def table():
    return measured()


def rows_of(table, **wanted):
    return table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])]


def predicted(model, rule, layer, constant):
    """Classes and log-probabilities of the truth by one whole run with hooks."""
    x, truth = next(IMAGES.batches(model)), torch.from_numpy(IMAGES.labels(model))
    with knocked_out(model, layer, rule, constant):
        logits = model(x)
    logp = logits.log_softmax(dim=1)[torch.arange(len(x)), truth]
    return (logits.argmax(dim=1) == truth).double().numpy(), logp.double().numpy()


@pytest.mark.parametrize("what", [removed, alone])
def test_each_row_is_a_whole_run_with_hooks(table, what):
    model, layer, expert = toy_moe(toy_vit()), 1, 2
    constant = intervention.mean_outputs(model, CALIBRATION)[layer]
    intact, intact_logp = predicted(model, removed(99), layer, constant)
    right, logp = predicted(model, what(expert), layer, constant)
    labels = IMAGES.labels(model)
    own = rows_of(table, layer=layer, expert=expert, what=what.__name__, system="expert")
    groups = {"all": labels >= 0, "cat": labels == 2, "pet": np.isin(labels, [2, 3, 5])}
    for name, group in groups.items():
        row = rows_of(own, group=name).iloc[0]
        assert row["images"] == group.sum()
        assert row["top1_intact"] == pytest.approx(intact[group].mean())
        assert row["top1"] == pytest.approx(right[group].mean())
        assert row["change"] == pytest.approx((right - intact)[group].mean())
        assert row["logp_change"] == pytest.approx((logp - intact_logp)[group].mean(), abs=1e-5)


def test_groups_intervals_and_the_dense_model(table):
    groups = table.groupby("kind")["group"].unique().map(list).to_dict()
    assert groups == {"all": ["all"], "class": [*CLASSES], "family": ["insect", "pet", "fish"]}
    assert len(table) == 3 * 4 * 2 * 2 * (1 + 6 + 3)
    wide = table[table["images"] > 3]
    assert wide["change"].between(wide["low"], wide["high"]).all()
    assert wide["logp_change"].between(wide["logp_low"], wide["logp_high"]).all()
    used = measure.routes(toy_moe(toy_vit()), IMAGES).shares(2)
    for what, lost in (("removed", used), ("alone", 1 - used)):
        for system in ("expert", "random tokens"):
            rows = rows_of(table, kind="all", layer=2, what=what, system=system)
            np.testing.assert_allclose(rows.sort_values("expert")["knocked_out"], lost, atol=1e-6)
    dense = measure.accuracy(toy_vit(), IMAGES)["top1"].item()
    assert set(table.query("kind == 'all'")["top1_dense"]) == {dense}


def test_classes_of_the_same_name_stay_apart(monkeypatch):
    module = sys.modules["moee_analysis.measure.knockout.knock_out"]
    monkeypatch.setattr(module, "class_labels", lambda _: ("crane", "blue", "crane", "white"))
    table = measure.knock_out(colour_model(), coloured_images(*range(4)), OTHERS, resamples=2)
    names = table[table["kind"] == "class"]["group"].unique()
    assert list(names) == ["crane (0)", "blue", "crane (2)", "white"]


def test_batches_of_other_sizes_and_other_layers_change_nothing(table):
    same = rows_of(table, layer=2).reset_index(drop=True)
    other = measured(layers=[2], batch_size=5)
    pd.testing.assert_frame_equal(other, same, atol=1e-5, check_flags=False)


@pytest.mark.parametrize("make", [
    lambda: toy_kinds(toy_vit()), lambda: toy_moe(toy_swin()),
    lambda: toy_moe(lively(SMALL_CONVNEXT)),
], ids=["kinds", "swin", "convnext"])  # fmt: skip
def test_the_fast_path_is_the_whole_model(make):
    model = make()
    layers, x = list(moe_layers(model))[-2:], pixels_of(model)
    kinds = 2 if hasattr(model, "cls_token") else 1
    rules = {layer: [removed(1), removed(2), alone(1)] for layer in layers}
    constants = {i: torch.randn(kinds, moe_layers(model)[i].fc2.out_features) for i in layers}
    with evaluating(model):
        plan = intervention.Plan(rules, constants)
        for layer, _, intact, seen in intervention.interventions(model, x, plan, model, size=3):
            torch.testing.assert_close(intact, model(x))
            for rule, fast in zip(rules[layer], seen, strict=True):
                with knocked_out(model, layer, rule, constants[layer]):
                    torch.testing.assert_close(fast, model(x), atol=1e-4, rtol=1e-4)
    assert hooks_of(model) == 0
    assert same_models(model, make())


def test_one_expert_carries_a_class_and_random_tokens_do_not():
    table = measure.knock_out(colour_model(), coloured_images(*range(8)), OTHERS, resamples=2)
    rows = rows_of(table, kind="class", what="removed")
    lost = rows.pivot(index=["system", "group"], columns="expert", values="logp_change")
    mine, random = (
        lost.loc[system].loc[[*COLOURS]].to_numpy() for system in ("expert", "random tokens")
    )
    assert (np.diag(mine) < -0.5).all()
    np.testing.assert_allclose(mine - np.diag(np.diag(mine)) @ np.eye(4, 5), 0, atol=1e-5)
    assert (np.diag(random) > np.diag(mine) + 0.1).all()  # half of them were black
    assert (random[:, 4] < -0.1).all()  # and black itself is replaced by colours
    assert (rows_of(rows, system="expert", expert=4)["change"] == 0).all()


SHAPE = 6, 5  # classes, experts
USE, NEED, *DRAWN = (
    np.random.default_rng(seed).dirichlet(np.ones(5), size=6) for seed in range(60)
)


def made(need, use=USE, *, random=0.0):
    """A table of knock-outs of one layer: by class and expert the use, and what is lost."""
    lost = {("removed", "expert"): need, ("removed", "random tokens"): random + 0 * need}
    rows = [
        {
            "layer": 2, "expert": e, "what": what, "system": system, "kind": "class",
            "group": f"class {c}", "knocked_out": use[c, e],
            "logp_change": -lost.get((what, system), 0 * need)[c, e],
        }
        for c, e in np.ndindex(need.shape)
        for what, system in itertools.product(("removed", "alone"), ("expert", "random tokens"))
    ]  # fmt: skip
    everything = {**rows[0], "kind": "all", "group": "all", "logp_change": 99.0}
    return pd.DataFrame([*rows, everything])


def found(table, system="expert"):
    return measure.use_and_need(table, permutations=200).set_index("system").loc[system]


def test_classes_that_need_what_they_use_correlate_beyond_chance():
    row = found(made(3 * USE))
    assert row["spearman"] == pytest.approx(1)
    assert row["null_high"] < 0.9
    assert row["p"] == pytest.approx(1 / 201)
    assert (row["top_match"], row["top_match_even"]) == (1, 1 / 5)
    assert (row["classes"], row["experts"]) == SHAPE
    pairs = uses_and_needs(made(3 * USE))
    assert len(pairs) == 3 * 6 * 5
    one = pairs[(pairs["system"] == "expert") & (pairs["expert"] == 1)]
    np.testing.assert_allclose(one["use"], USE[:, 1] - USE[:, 1].mean())
    np.testing.assert_allclose(one["need"], 3 * one["use"])


def test_it_is_the_rank_correlation_of_the_excess_over_other_classes():
    expected = spearmanr((USE - USE.mean(axis=0)).ravel(), (NEED - NEED.mean(axis=0)).ravel())
    for need in (NEED, NEED + np.arange(5)):  # an expert that all need is no class's own
        assert found(made(need))["spearman"] == pytest.approx(expected.statistic)


def test_unrelated_use_and_need_are_chance():
    p = [found(made(need, use))["p"] for need, use in zip(DRAWN[::2], DRAWN[1::2], strict=True)]
    assert 0.3 < np.mean(p) < 0.7


def test_random_tokens_that_explain_all_leave_nothing_beyond_them():
    table = made(USE, random=USE)
    assert found(table, "random tokens")["spearman"] == pytest.approx(1)
    beyond = found(table, "beyond random tokens")
    assert (beyond["spearman"], beyond["p"]) == (0, 1)
    half = found(made(USE, random=USE / 2), "beyond random tokens")
    assert half["spearman"] == pytest.approx(1)


def test_experts_that_carry_classes_are_found_in_a_model():
    images, others = coloured_images(*range(12)), coloured_images(*range(100, 104))
    table = measure.knock_out(colour_model(), images, others, resamples=2)
    row = measure.use_and_need(table).set_index("system").loc["beyond random tokens"]
    assert row["spearman"] > row["null_high"]
    assert row["p"] < 0.1  # of four classes there are 24 orders
    assert (row["top_match"], row["experts"]) == (1, BLACK + 1)
