from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.lagrangian import Offer, choose

SHARES = [0.1, 0.4, 0.7, 0.95]


def offers_of(*sizes, seed=0):
    """One layer for each (experts, hidden): scores of many magnitudes, its own prices."""
    rng = np.random.default_rng(seed)
    return [
        Offer(
            10 ** rng.normal(-3, 1, size=(experts, hidden)),
            rng.gamma(1.0, 20.0, size=experts),
            macs=2 * width,
            parameters=2 * width + 1,
        )
        for (experts, hidden), width in zip(sizes, itertools.cycle([32, 64]))
    ]


def macs_of(offers, kept):
    return sum(offer.macs_of(mask) for offer, mask in zip(offers, kept, strict=True))


def parameters_of(offers, kept):
    return sum(offer.parameters_of(mask) for offer, mask in zip(offers, kept, strict=True))


def cost_of(offers, kept):
    """What is lost with all that is dropped, for one image."""
    return sum(
        float(offer.tokens @ np.where(mask, 0, offer.scores).sum(axis=1))
        for offer, mask in zip(offers, kept, strict=True)
    )


def everything(offers):
    return [np.ones(offer.scores.shape, dtype=bool) for offer in offers]


def every_choice(offers):
    """Every way to keep or drop the neurons of every expert."""
    shapes = [offer.scores.shape for offer in offers]
    places = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    for bits in itertools.product([False, True], repeat=places[-1]):
        flat = np.array(bits)
        yield [
            flat[a:b].reshape(shape)
            for a, b, shape in zip(places[:-1], places[1:], shapes, strict=True)
        ]


WIDE = offers_of((5, 40), (3, 60), (1, 30))
TINY = offers_of((2, 4), (1, 4), seed=3)
CHOICES = list(every_choice(TINY))


# What a choice costs


def test_macs_are_those_of_every_token_through_its_expert_s_neurons():
    offer = WIDE[0]
    kept = offer.scores > np.median(offer.scores)
    neurons = [offer.tokens[e] * kept[e].sum() for e in range(5)]
    assert offer.macs_of(kept) == pytest.approx(offer.macs * sum(neurons))


def test_a_neuron_of_several_experts_is_stored_once():
    offer = WIDE[0]
    kept = np.zeros((5, 40), dtype=bool)
    kept[[0, 3, 4], 7] = kept[1, 9] = True
    assert offer.parameters_of(kept) == 2 * offer.parameters


# At given prices


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_is_worth_more_at_the_same_prices(seed):
    (offer,) = offers_of((3, 4), seed=seed)
    rng = np.random.default_rng(seed)
    for per_mac, per_parameter in 10 ** rng.normal([-5, -4], 0.7, size=(10, 2)):

        def charged(kept, prices=(per_mac, per_parameter)):
            macs, stored = offer.macs_of(kept), offer.parameters_of(kept)
            return cost_of([offer], [kept]) + prices[0] * macs + prices[1] * stored

        least = min(charged(kept) for (kept,) in every_choice([offer]))
        assert charged(offer.kept(per_mac, per_parameter)) == pytest.approx(least, rel=1e-9)


def test_what_is_free_is_kept_where_it_is_worth_anything():
    scores = np.array([[1.0, 0.0, 1e-30]])
    assert Offer(scores, np.ones(1), 2, 3).kept(0.0, 0.0).tolist() == [[True, False, True]]


# One budget


@pytest.mark.parametrize("share", SHARES)
def test_a_budget_of_macs_is_used_up_to_one_neuron(share):
    budget = share * macs_of(WIDE, everything(WIDE))
    kept = choose(WIDE, macs=budget)
    dropped = [
        offer.macs * offer.tokens[expert]
        for offer, mask in zip(WIDE, kept, strict=True)
        for expert in np.flatnonzero(~mask.all(axis=1))
    ]
    assert 0 <= budget - macs_of(WIDE, kept) < max(dropped)


@pytest.mark.parametrize("share", SHARES)
def test_a_budget_of_parameters_is_used_up_to_one_neuron(share):
    budget = share * parameters_of(WIDE, everything(WIDE))
    kept = choose(WIDE, parameters=budget)
    assert 0 <= budget - parameters_of(WIDE, kept) < max(offer.parameters for offer in WIDE)
    for mask in kept:
        assert (mask == mask.any(axis=0)).all()  # what is stored, every expert may use


@pytest.mark.parametrize("share", SHARES)
def test_under_a_budget_of_macs_the_scores_alone_decide(share):
    kept = choose(WIDE, macs=share * macs_of(WIDE, everything(WIDE)))
    rates = [offer.scores / offer.macs for offer in WIDE]
    lowest = min(rate[mask].min() for rate, mask in zip(rates, kept, strict=True) if mask.any())
    highest = max(
        rate[~mask].max() for rate, mask in zip(rates, kept, strict=True) if not mask.all()
    )
    assert lowest > highest


# Both at once


@pytest.mark.parametrize("macs", SHARES)
@pytest.mark.parametrize("parameters", SHARES)
def test_both_budgets_are_met_and_one_of_them_is_used(macs, parameters):
    budgets = {
        "macs": macs * macs_of(WIDE, everything(WIDE)),
        "parameters": parameters * parameters_of(WIDE, everything(WIDE)),
    }
    kept = choose(WIDE, **budgets)
    left = {
        "macs": 1 - macs_of(WIDE, kept) / budgets["macs"],
        "parameters": 1 - parameters_of(WIDE, kept) / budgets["parameters"],
    }
    assert min(left.values()) >= 0
    assert min(left.values()) < 0.1


# Against all there is


@pytest.mark.parametrize("macs", [0.2, 0.4, 0.6, 0.8, math.inf])
@pytest.mark.parametrize("parameters", [0.25, 0.5, 0.75, math.inf])
def test_no_choice_within_the_budgets_is_much_better(macs, parameters):
    budgets = (
        macs * macs_of(TINY, everything(TINY)),
        parameters * parameters_of(TINY, everything(TINY)),
    )
    fitting = [
        kept
        for kept in CHOICES
        if macs_of(TINY, kept) <= budgets[0] and parameters_of(TINY, kept) <= budgets[1]
    ]
    least = min(cost_of(TINY, kept) for kept in fitting)
    kept = choose(TINY, macs=budgets[0], parameters=budgets[1])
    assert macs_of(TINY, kept) <= budgets[0]
    assert parameters_of(TINY, kept) <= budgets[1]
    assert cost_of(TINY, kept) <= 1.05 * least


@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_a_larger_budget_never_costs_more(name):
    measure = {"macs": macs_of, "parameters": parameters_of}[name]
    whole = measure(WIDE, everything(WIDE))
    costs = [
        cost_of(WIDE, choose(WIDE, **{name: share * whole})) for share in np.linspace(0, 1.1, 12)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


# The ends


def test_without_a_budget_all_that_is_worth_anything_is_kept():
    scores = np.array([[0.5, 0.0, 1e-9], [0.0, 0.0, 2.0]])
    (kept,) = choose([Offer(scores, np.array([3.0, 1.0]), macs=8, parameters=9)])
    np.testing.assert_array_equal(kept, scores > 0)


def test_a_budget_of_nothing_keeps_nothing():
    assert not any(mask.any() for mask in choose(WIDE, macs=0))
    assert not any(mask.any() for mask in choose(WIDE, parameters=0))


@pytest.mark.parametrize(("name", "told"), [("macs", "MACs"), ("parameters", "parameters")])
def test_a_budget_below_zero_is_refused_with_what_is_missing(name, told):
    with pytest.raises(MoeeError, match=f"a budget of {told}.*fit into; found 1.23e") as error:
        choose(WIDE, **{name: -12300.0})
    assert "too few" in error.value.found


def test_an_expert_that_no_token_uses_keeps_nothing():
    offer = Offer(WIDE[0].scores, np.array([0.0, 1, 1, 1, 1]), macs=64, parameters=65)
    (kept,) = choose([offer])
    assert not kept[0].any()
    assert kept[1:].all()
