from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction import iterative_pruning as narrowing
from moee_analysis.extraction.budget import sized
from moee_analysis.extraction.cross_token_fisher import cohering
from moee_analysis.extraction.experts.obs import elimination_costs
from moee_analysis.extraction.iterative_pruning import narrowed
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.plan import plan_layers
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.fisher import root
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count_parameters
from tests.helpers.makers import best, lively, pixels_of
from tests.helpers.toys import toy_images, toy_vit

IMAGES = toy_images(8)
CONFIG = best(order="obs", macs_reduction=0.1, params_reduction=0.25).resolved()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The calibration of a toy, and its plans with scores that cohere."""
    calibration = Calibration(toy_vit(), IMAGES, CONFIG, tmp_path_factory.mktemp("store"))
    plans = plan_layers(calibration)
    kept = sized(calibration.model, plans, CONFIG).kept
    return calibration, cohering(calibration, plans, kept)


def hidden_of(calibration, plan):
    """Hidden activations of every expert's tokens, float64 (tokens, hidden)."""
    (layer,) = (part[plan.site.name] for part in calibration.parts([plan.site]))
    _, members = plan.assignment.of(layer)
    hidden = layer.sample.hidden[np.arange(len(layer.sample))].astype(float)
    return [hidden[members == expert] for expert in range(plan.assignment.experts)]


def step_by_hand(calibration, plans, share):
    """Costs of every neuron that the union for ``share`` of the budget leaves, by site name."""
    asked = replace(CONFIG, params_reduction=share * 0.25)
    kept = sized(calibration.model, plans, asked).kept
    found = {}
    for plan, site in zip(plans[:2], find_mlps(calibration.model), strict=False):
        among = torch.from_numpy(kept[site.name].any(axis=0))
        W2 = site.module(calibration.model).fc2.weight.double()
        costs = []
        for expert, hidden in enumerate(hidden_of(calibration, plan)):
            covariance = torch.from_numpy(np.cov(hidden.T, bias=True))
            half = root(torch.from_numpy(np.array(plan.known.metrics[expert])))
            factor = 1 if expert < len(set(plan.prefix)) else plan.coherence
            cost = elimination_costs(covariance, half @ W2, among=among)
            costs.append(factor * cost.numpy())
        found[site.name] = np.stack(costs)
    return found


def close(found, expected):
    """Require the same costs but for the rounding of sums in single precision."""
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_one_step_scores_what_is_left_on_what_is_left(planned, monkeypatch):
    calibration, plans = planned
    monkeypatch.setattr(narrowing, "STEPS", (1.0,))
    found = narrowed(calibration, plans)
    expected = step_by_hand(calibration, plans, 1.0)
    for plan, before in zip(found[:2], plans, strict=False):
        close(plan.scores.neurons, expected[plan.site.name])
        assert plan.coherence == pytest.approx(before.coherence)
        assert plan.known is before.known
        np.testing.assert_array_equal(plan.scores.weight, before.scores.weight)


def test_every_step_starts_from_the_last(planned, monkeypatch):
    calibration, plans = planned
    monkeypatch.setattr(narrowing, "STEPS", (0.5, 1.0))
    found = narrowed(calibration, plans)
    monkeypatch.setattr(narrowing, "STEPS", (0.5,))
    half = narrowed(calibration, plans)
    expected = step_by_hand(calibration, half, 1.0)
    for plan, first in zip(found[:2], half, strict=False):
        close(plan.scores.neurons, expected[plan.site.name])
        assert not plan.scores.neurons[:, ~first.scores.neurons.any(axis=0)].any()


def test_a_layer_with_a_constant_expert_is_left_alone(planned):
    calibration, plans = planned
    assert narrowed(calibration, plans)[2] is plans[2]


@pytest.mark.parametrize("order", ["obs", "weighted"])
def test_the_budgets_are_met_after_the_last_step_too(order):
    config = best(order=order, macs_reduction=0.25, params_reduction=0.15)
    run = extract(lively(), IMAGES, config)
    saved = 1 - count_parameters(run.model) / count_parameters(run.dense())
    assert 0.15 <= saved < 0.16


def test_steps_make_another_model_and_only_where_parameters_are_bound():
    model, x = lively(), pixels_of(lively())
    bound = {"order": "obs", "macs_reduction": 0.25, "params_reduction": 0.2}
    for budgets, same in ((bound, False), ({**bound, "params_reduction": None}, True)):
        once, steps = (
            extract(model, IMAGES, best(**budgets, union=union)).model
            for union in ("at_once", "steps")
        )
        assert torch.equal(once(x), steps(x)) is same
        assert torch.isfinite(steps(x)).all()
