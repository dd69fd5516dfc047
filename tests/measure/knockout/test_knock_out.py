import sys

import numpy as np
import pandas as pd
import pytest
import torch

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.measure.knockout.intervention import (
    Plan,
    alone,
    interventions,
    knocked_out,
    mean_outputs,
    removed,
)
from moee_analysis.models.capture import evaluating
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import ConstantRouter
from tests.helpers.colours import COLOURS, colour_model, coloured_images
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


def measured(model=None, **options):
    model = model or toy_moe(toy_vit())
    options = {"reference": toy_vit(), "families": FAMILIES, "resamples": 50, "seed": 3} | options
    return measure.knock_out(model, IMAGES, options.pop("calibration", CALIBRATION), **options)


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
    constant = mean_outputs(model, CALIBRATION)[layer]
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
    assert (wide["low"] <= wide["change"]).all()
    assert (wide["logp_change"] <= wide["logp_high"]).all()
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
    model = toy_moe(toy_vit())
    other = measured(model, layers=[2], batch_size=5)
    same = rows_of(table, layer=2).reset_index(drop=True)
    pd.testing.assert_frame_equal(other, same, atol=1e-5, check_flags=False)
    assert hooks_of(model) == 0
    assert same_models(model, toy_moe(toy_vit()))


@pytest.mark.parametrize(
    "model",
    [toy_kinds(toy_vit()), toy_moe(toy_swin()), toy_moe(lively(SMALL_CONVNEXT))],
    ids=["kinds", "swin", "convnext"],
)
def test_the_fast_path_is_the_whole_model(model):
    layers, x = list(moe_layers(model))[-2:], pixels_of(model)
    kinds = 2 if hasattr(model, "cls_token") else 1
    rules = {layer: [removed(1), removed(2), alone(1)] for layer in layers}
    constants = {i: torch.randn(kinds, moe_layers(model)[i].fc2.out_features) for i in layers}
    with evaluating(model):
        plan = Plan(rules, constants)
        for layer, _, intact, seen in interventions(model, x, plan, model, size=3):
            torch.testing.assert_close(intact, model(x))
            for rule, fast in zip(rules[layer], seen, strict=True):
                with knocked_out(model, layer, rule, constants[layer]):
                    torch.testing.assert_close(fast, model(x), atol=1e-4, rtol=1e-4)


def test_several_experts_per_token_are_refused():
    model = toy_moe(toy_vit())
    moe_layers(model)[0].router = ConstantRouter([0, 1])
    with pytest.raises(MoeeError, match="one expert per token"):
        measured(model)


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


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration": IMAGES.take([3])}, "used for calibration"),
    ({"layers": [7]}, "layer 7"),
    ({"controls": 0}, "controls as a whole number"),
    ({"families": {"ant": "insect"}}, "family of every class"),
])  # fmt: skip
def test_what_cannot_be_knocked_out_is_refused(options, message):
    with pytest.raises(MoeeError, match=message):
        measured(**options)
