from __future__ import annotations

import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.budget import WORTHWHILE, sized, without_thin
from moee_analysis.extraction.experts.variance_share import rank_neurons
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.plan import plan_layers
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.measure import macs
from moee_analysis.models.macs import count_parameters
from moee_analysis.moe.layer import moe_layers
from tests.helpers.makers import best, lively, quick
from tests.helpers.toys import toy_images, toy_swin, toy_vit

IMAGES = toy_images(8)
CLOSE = 0.003  # of the dense model's


def saved(run):
    """Shares of the dense model's MACs and parameters that a run saves on its calibration."""
    found, dense = (macs(model).iloc[-1] for model in (run, run.dense()))
    return {name: 1 - found[name] / dense[name] for name in ("macs", "params")}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans of the two recipes for a toy."""
    root, model = tmp_path_factory.mktemp("store"), toy_vit()
    settings = {"best": best().resolved(), "paper": quick().resolved()}
    return model, {
        name: plan_layers(Calibration(model, IMAGES, config, root))
        for name, config in settings.items()
    }


# Budgets of whole runs


@pytest.mark.parametrize(
    ("build", "reduction"), [(toy_vit, 0.15), (toy_vit, 0.3), (toy_swin, 0.3), (lively, 0.25)]
)
def test_one_budget_of_macs_is_met(build, reduction):
    run = extract(build(), IMAGES, best(macs_reduction=reduction))
    assert run.variance_kept is None
    assert reduction - 1e-9 <= saved(run)["macs"] < reduction + CLOSE


@pytest.mark.parametrize("build", [toy_vit, toy_swin, lively])
def test_one_budget_of_parameters_is_met(build):
    run = extract(build(), IMAGES, best(params_reduction=0.2))
    one_neuron = 65 / count_parameters(run.dense())
    assert 0.2 <= saved(run)["params"] < 0.2 + max(CLOSE, one_neuron)


@pytest.mark.parametrize(
    ("build", "mac", "parameter"),
    [(toy_vit, 0.3, 0.05), (toy_vit, 0.25, 0.22), (toy_vit, 0.1, 0.25), (lively, 0.25, 0.15)],
)
def test_two_budgets_are_met_at_once(build, mac, parameter):
    budgets = {"macs_reduction": mac, "params_reduction": parameter}
    found = saved(extract(build(), IMAGES, best(**budgets)))
    over = [found["macs"] - mac, found["params"] - parameter]
    assert min(over) > -1e-9
    assert min(over) < CLOSE


@pytest.mark.parametrize("refit", ["none", "shift", "shared"])
def test_what_the_refit_stores_counts_as_parameters(refit):
    run = extract(toy_vit(), IMAGES, best(params_reduction=0.2, refit=refit))
    assert 0.2 <= saved(run)["params"] < 0.2 + CLOSE


@pytest.mark.parametrize("pieces", [{"experts": "one"}, {"router": "cosine"}, {"layers": (0, 2)}])
def test_a_budget_is_met_whatever_the_other_pieces(pieces):
    found = saved(extract(toy_vit(), IMAGES, best(macs_reduction=0.2, **pieces)))
    assert 0.2 <= found["macs"] < 0.2 + CLOSE


def test_the_paper_can_have_one_budget_too():
    run = extract(toy_vit(), IMAGES, quick(budget="global", macs_reduction=0.2))
    assert 0.2 <= saved(run)["macs"] < 0.2 + CLOSE


@pytest.mark.parametrize(
    ("budget", "told"), [("macs_reduction", "MACs"), ("params_reduction", "parameters")]
)
def test_a_budget_that_cannot_be_met_is_refused(budget, told):
    with pytest.raises(MoeeError, match=f"a budget of {told}.*too few"):
        extract(toy_vit(), IMAGES, best(**{budget: 0.99}))


def test_everything_is_kept_where_nothing_has_to_be_saved():
    run = extract(toy_vit(), IMAGES, best(macs_reduction=1e-6, thin="routed"))
    assert [set(layer.sizes) for layer in run.layers] == [{64}, {64}, {64, 0}]


# Layers that would save too little


def keeping(plans, shares):
    """The first neurons of every expert, so that the routed layers save about these shares."""
    kept = {}
    for plan, share in zip(plans, shares, strict=True):
        mask = np.zeros(plan.scores.neurons.shape, dtype=bool)
        of_router = plan.router().macs / (2 * plan.site.dim)
        mask[:, : round((1 - share) * plan.site.hidden - of_router)] = True
        kept[plan.site.name] = mask
    return kept


@pytest.mark.parametrize(
    ("shares", "thin"),
    [
        ((0.5, 0.5, 0.0), []),
        ((0.03, 0.7, 0.0), [0]),
        ((WORTHWHILE + 0.02, 0.8, 0.0), []),  # a quarter of the mean is more, but this is enough
        ((0.01, 0.3, 0.0), [0]),
        ((0.05, 0.1, 0.0), []),  # no layer saves much
    ],
)
def test_routed_layers_that_save_hardly_anything_stay_dense(planned, shares, thin):
    _, plans = planned
    left = without_thin(plans["best"], keeping(plans["best"], shares))
    assert [plan.site.index for plan in left if plan.thin] == thin
    for plan, before in zip(left, plans["best"], strict=True):
        assert plan.converted != plan.thin
        assert plan.thin or plan is before  # the last layer needs no router
        assert not plan.thin or plan.partition.reason.startswith("its experts would save ")


@pytest.mark.parametrize("budgets", [{"macs_reduction": 0.22}, {"params_reduction": 0.15}])
def test_the_others_meet_the_budget_of_layers_that_stay_dense(budgets):
    model = toy_vit()
    model.blocks[0].mlp.fc2.weight.data *= 30  # the prediction depends on this layer most
    runs = {
        thin: extract(model, IMAGES, best(thin=thin, **budgets)) for thin in ("dense", "routed")
    }
    assert [layer.thin for layer in runs["dense"].layers] == [True, False, False]
    assert list(moe_layers(runs["dense"].model)) == [1, 2]
    assert list(moe_layers(runs["routed"].model)) == [0, 1, 2]
    for run in runs.values():
        for name, reduction in budgets.items():
            found = saved(run)[name.removesuffix("_reduction")]
            assert reduction - 1e-9 <= found < reduction + CLOSE


# What one layer keeps


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_with_a_share_every_expert_keeps_the_fewest_neurons_that_hold_it(planned, p):
    model, plans = planned
    sizes = sized(model, plans["paper"], quick(variance_kept=p).resolved())
    assert sizes.variance_kept == p
    for plan in plans["paper"]:
        kept = [np.flatnonzero(mask).tolist() for mask in sizes.kept[plan.site.name]]
        expected = rank_neurons(plan.scores.neurons).kept(p)
        assert kept == [ids.tolist() for ids in expected]


@pytest.mark.parametrize("budget", [{"macs_reduction": 0.2}, {"variance_kept": 1.0}])
def test_a_share_leaves_constant_experts_empty(planned, budget):
    model, plans = planned
    config = best(budget="share", **budget).resolved()
    kept = sized(model, plans["best"], config).kept
    assert kept["blocks.2.mlp"].any(axis=1).tolist() == [True, False]
    assert all(mask.any(axis=1).all() for name, mask in kept.items() if "2" not in name)


def test_more_to_save_never_keeps_more(planned):
    model, plans = planned
    neurons = [
        sum(mask.sum() for mask in sized(model, plans["best"], config).kept.values())
        for config in (best(macs_reduction=r).resolved() for r in (0.12, 0.2, 0.3))
    ]
    assert neurons == sorted(neurons, reverse=True)


def test_layers_compete_for_one_budget(planned):
    model, plans = planned
    kept = sized(model, plans["best"], best(macs_reduction=0.25).resolved()).kept
    for name, mask in kept.items():
        scores = next(plan.scores.neurons for plan in plans["best"] if plan.site.name == name)
        for own, row in zip(mask, scores, strict=True):
            assert not own.any() or own.all() or row[own].min() >= row[~own].max()


def test_parameters_alone_keep_a_neuron_for_all_experts_or_for_none(planned):
    model, plans = planned
    kept = sized(model, plans["best"], best(params_reduction=0.2).resolved()).kept
    for mask in [kept["blocks.0.mlp"], kept["blocks.1.mlp"]]:
        assert (mask == mask.any(axis=0)).all()


def test_a_layer_that_is_left_out_costs_what_it_did(tmp_path):
    model = toy_vit()
    run = extract(model, IMAGES, best(params_reduction=0.1, layers=(0,)))
    assert list(moe_layers(run.model)) == [0]
    budget = 0.9 * count_parameters(model)
    assert 0.997 * budget < count_parameters(run.model) <= budget
