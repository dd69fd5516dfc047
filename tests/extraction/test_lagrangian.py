import itertools
import math

import numpy as np
import pytest

from moee_analysis.extraction.lagrangian import Candidates, choose

SHARES = [0.1, 0.4, 0.7, 0.95]


def layers_of(*sizes, seed=0):
    """One layer for each (experts, hidden): scores of many magnitudes, its own prices."""
    rng = np.random.default_rng(seed)
    return [
        Candidates(
            10 ** rng.normal(-3, 1, size=(experts, hidden)),
            rng.gamma(1.0, 20.0, size=experts),
            macs=2 * width,
            parameters=2 * width + 1,
        )
        for (experts, hidden), width in zip(sizes, itertools.cycle([32, 64]))
    ]


def spent(layers, kept):
    """MACs and parameters of the kept neurons."""
    spent_by = {"macs": Candidates.macs_of, "parameters": Candidates.parameters_of}
    return {name: sum(map(of, layers, kept)) for name, of in spent_by.items()}


def budgets_of(layers, **shares):
    """Shares of what everything costs."""
    whole = spent(layers, [np.ones(layer.scores.shape, dtype=bool) for layer in layers])
    return {name: share * whole[name] for name, share in shares.items()}


def cost_of(layers, kept):
    """What is lost with all that is dropped, for one image."""
    return sum(
        float(layer.tokens @ np.where(mask, 0, layer.scores).sum(axis=1))
        for layer, mask in zip(layers, kept, strict=True)
    )


def every_choice(layers):
    """Every way to keep or drop the neurons of every expert."""
    shapes = [layer.scores.shape for layer in layers]
    places = np.cumsum([0, *map(math.prod, shapes)])
    for bits in itertools.product([False, True], repeat=places[-1]):
        flat = np.split(np.array(bits), places[1:-1])
        yield [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]


WIDE = layers_of((5, 40), (3, 60), (1, 30))
TINY = layers_of((2, 4), (1, 4), seed=3)
CHOICES = list(every_choice(TINY))


def test_macs_are_those_of_every_token_and_a_neuron_of_several_experts_is_stored_once():
    layer = WIDE[0]
    kept = layer.scores > np.median(layer.scores)
    neurons = [layer.tokens[e] * kept[e].sum() for e in range(5)]
    assert layer.macs_of(kept) == pytest.approx(layer.macs * sum(neurons))
    few = np.zeros((5, 40), dtype=bool)
    few[[0, 3, 4], 7] = few[1, 9] = True
    assert layer.parameters_of(few) == 2 * layer.parameters


@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_is_worth_more_at_the_same_prices(seed):
    (layer,) = layers_of((3, 4), seed=seed)
    rng = np.random.default_rng(seed)
    for prices in 10 ** rng.normal([-5, -4], 0.7, size=(5, 2)):

        def charged(kept, prices=prices):
            return cost_of([layer], [kept]) + prices @ list(spent([layer], [kept]).values())

        least = min(charged(kept) for (kept,) in every_choice([layer]))
        assert charged(layer.worth(*prices)) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_a_budget_is_used_up_to_one_neuron_and_the_scores_decide(share):
    budget = budgets_of(WIDE, macs=share)["macs"]
    kept = list(zip(WIDE, choose(WIDE, macs=budget), strict=True))
    left = budget - sum(layer.macs_of(mask) for layer, mask in kept)
    one = max(e.macs * e.tokens[i] for e, mask in kept for i in np.flatnonzero(~mask.all(axis=1)))
    assert 0 <= left < one
    lowest = min((e.scores / e.macs)[mask].min() for e, mask in kept if mask.any())
    assert lowest > max((e.scores / e.macs)[~mask].max() for e, mask in kept if not mask.all())
    stored = budgets_of(WIDE, parameters=share)
    masks = choose(WIDE, **stored)
    left = stored["parameters"] - spent(WIDE, masks)["parameters"]
    assert 0 <= left < max(layer.parameters for layer in WIDE)
    assert all((m == m.any(axis=0)).all() for m in masks)  # what is stored, every expert may use


@pytest.mark.parametrize("macs", [0.2, 0.4, 0.6, 0.8, math.inf])
@pytest.mark.parametrize("parameters", [0.25, 0.5, 0.75, math.inf])
def test_no_choice_within_the_budgets_is_much_better(macs, parameters):
    budgets = budgets_of(TINY, macs=macs, parameters=parameters)

    def fits(kept):
        return all(spent(TINY, kept)[name] <= budget for name, budget in budgets.items())

    least = min(cost_of(TINY, kept) for kept in CHOICES if fits(kept))
    kept = choose(TINY, **budgets)
    assert fits(kept)
    assert cost_of(TINY, kept) <= 1.05 * least


@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_a_larger_budget_never_costs_more(name):
    shares = np.linspace(0, 1.1, 12)
    kept = [choose(WIDE, **budgets_of(WIDE, **{name: share})) for share in shares]
    costs = [cost_of(WIDE, each) for each in kept]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0
    assert not any(mask.any() for mask in kept[0])


def test_without_a_budget_all_that_is_worth_anything_is_kept():
    scores = np.array([[0.5, 0.0, 1e-9], [0.0, 0.0, 2.0]])
    (kept,) = choose([Candidates(scores, np.array([3.0, 1.0]), macs=8, parameters=9)])
    np.testing.assert_array_equal(kept, scores > 0)
    unused = Candidates(WIDE[0].scores, np.array([0.0, 1, 1, 1, 1]), macs=64, parameters=65)
    (kept,) = choose([unused])  # an expert that no token uses keeps nothing
    assert not kept[0].any()
    assert kept[1:].all()
