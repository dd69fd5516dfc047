from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis import narrowing
from moee_analysis.coherence import cohering
from moee_analysis.counting import count_parameters
from moee_analysis.elimination import elimination_costs
from moee_analysis.extraction import extract
from moee_analysis.fisher import expert_metrics, root
from moee_analysis.moments import moments_of
from moee_analysis.narrowing import narrowed
from moee_analysis.planning import plan_layers, sampled
from moee_analysis.recorded import recorded_layer
from moee_analysis.sizing import sized
from tests.makers import best, lively, pixels_of
from tests.toys import toy_images, toy_vit

IMAGES = toy_images(8)
CONFIG = best(order="obs", macs_reduction=0.1, params_reduction=0.25).resolved()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def planned(store):
    """A toy, and its plans with scores that cohere."""
    model = toy_vit()
    plans = plan_layers(model, IMAGES, CONFIG, root=store)
    kept = sized(model, plans, CONFIG).kept
    return model, cohering(model, IMAGES, plans, kept, CONFIG, root=store)


def step_by_hand(model, plans, store, share):
    """Costs of every neuron that the union for ``share`` of the budget leaves, by site name."""
    kept = sized(model, plans, replace(CONFIG, params_reduction=share * 0.25)).kept
    activations = sampled(model, IMAGES, CONFIG, root=store)
    found = {}
    for plan in plans[:2]:
        layer = recorded_layer(activations, model, plan.site)
        among = torch.from_numpy(kept[plan.site.name].any(axis=0))
        W2 = layer.mlp.fc2.weight.double()
        costs = []
        for expert, Q in enumerate(expert_metrics(layer.sample, plan.members, plan.kinds(layer))):
            moments = moments_of(layer.sample, np.flatnonzero(plan.members == expert))
            factor = 1 if expert < len(set(plan.prefix)) else plan.coherence
            cost = elimination_costs(moments.covariance, root(Q) @ W2, among=among)
            costs.append(factor * cost.numpy())
        found[plan.site.name] = np.stack(costs)
    return found


def test_one_step_scores_what_is_left_on_what_is_left(planned, store, monkeypatch):
    model, plans = planned
    monkeypatch.setattr(narrowing, "STEPS", (1.0,))
    found = narrowed(model, IMAGES, plans, CONFIG, root=store)
    expected = step_by_hand(model, plans, store, 1.0)
    for plan, before in zip(found[:2], plans, strict=False):
        np.testing.assert_allclose(plan.scores.neurons, expected[plan.site.name], rtol=1e-9)
        assert plan.coherence == pytest.approx(before.coherence)
        np.testing.assert_array_equal(plan.scores.means, before.scores.means)


def test_every_step_starts_from_the_last(planned, store, monkeypatch):
    model, plans = planned
    monkeypatch.setattr(narrowing, "STEPS", (0.5, 1.0))
    found = narrowed(model, IMAGES, plans, CONFIG, root=store)
    monkeypatch.setattr(narrowing, "STEPS", (0.5,))
    half = narrowed(model, IMAGES, plans, CONFIG, root=store)
    expected = step_by_hand(model, half, store, 1.0)
    for plan, first in zip(found[:2], half, strict=False):
        np.testing.assert_allclose(plan.scores.neurons, expected[plan.site.name], rtol=1e-9)
        assert not plan.scores.neurons[:, ~first.scores.neurons.any(axis=0)].any()


def test_a_layer_with_a_constant_expert_is_left_alone(planned, store):
    model, plans = planned
    assert narrowed(model, IMAGES, plans, CONFIG, root=store)[2] is plans[2]


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
