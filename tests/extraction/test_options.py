"""Several ways to compute each layer in one budget of time."""

import itertools

import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.lagrangian import Candidates, Option, choose, choose_options

SHARES = [0.3, 0.45, 0.6, 0.75, 0.9]


def candidates(rng, experts, hidden, seconds):
    scores = 10 ** rng.normal(-3, 0.7, size=(experts, hidden))
    return Candidates(scores, rng.gamma(2.0, 5.0, size=experts), seconds, parameters=0)


def toys(seed, layers=3):
    """Layers that are dense, routed (a dear start, each neuron cheap), or pruned alike."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(layers):
        routed, pruned = candidates(rng, 3, 4, 0.3), candidates(rng, 1, 4, 1.0)
        dense = 0.9 * pruned.macs_of(np.ones((1, 4), dtype=bool))
        found.append([Option(dense), Option(0.3 * dense, routed), Option(0.02 * dense, pruned)])
    return found


def every_choice(option):
    """Seconds and loss of an option with every set of its neurons."""
    if option.candidates is None:
        return [(option.fixed, 0.0)]
    own, found = option.candidates, []
    for bits in itertools.product([False, True], repeat=own.scores.size):
        kept = np.array(bits).reshape(own.scores.shape)
        lost = float(own.tokens @ np.where(kept, 0, own.scores).sum(axis=1))
        found.append((option.fixed + own.macs_of(kept), lost))
    return found


def pareto(choices):
    """Those that no other one beats in both."""
    best, kept = np.inf, []
    for seconds, lost in sorted(choices):
        if lost < best:
            best = lost
            kept.append((seconds, lost))
    return kept


def least_loss(layers, budget):
    """By a loop over all options of all layers with all sets of their neurons."""
    fronts = [pareto(c for option in options for c in every_choice(option)) for options in layers]
    whole = [(0.0, 0.0)]
    for front in fronts:
        whole = pareto((a + c, b + d) for (a, b), (c, d) in itertools.product(whole, front))
    return min((lost for seconds, lost in whole if seconds <= budget), default=None)


def spent(layers, chosen, price):
    found = [options[n].at(price) for options, n in zip(layers, chosen, strict=True)]
    return np.sum(found, axis=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", SHARES)
def test_no_choice_is_much_better_with_a_neuron_less(seed, share):
    layers = toys(seed)
    budget = share * sum(options[0].fixed for options in layers)
    seconds, lost = spent(layers, *choose_options(layers, budget))
    assert seconds <= budget
    own = [option.candidates for options in layers for option in options[1:]]
    neuron = max(each.macs * each.tokens.max() for each in own)  # what may be left over
    assert lost <= 1.05 * least_loss(layers, budget - neuron)


@pytest.mark.parametrize("price", [0.0, 1e-4, 1e-3, 1e2])
def test_an_option_takes_and_loses_what_its_neurons_do(price):
    option = toys(0)[0][1]
    kept, own = option.kept(price), option.candidates
    seconds, lost = option.at(price)
    assert seconds == pytest.approx(option.fixed + own.macs_of(kept))
    assert lost == pytest.approx(own.tokens @ np.where(kept, 0, own.scores).sum(axis=1))
    assert Option(2.5).at(price) == (2.5, 0.0)


@pytest.mark.parametrize("share", SHARES)
def test_of_one_option_each_the_neurons_are_those_of_the_budget_in_macs(share):
    rng = np.random.default_rng(1)
    macs = [candidates(rng, 4, 20, width) for width in (32, 64, 64)]
    whole = sum(own.macs_of(np.ones(own.scores.shape)) for own in macs)
    factor, router = 1e-9, 0.01 * whole
    seconds = [Candidates(o.scores, o.tokens, factor * o.macs, 0) for o in macs]
    layers = [[Option(factor * router, own)] for own in seconds]
    _, price = choose_options(layers, factor * (share * whole + 3 * router))
    for (option,), wanted in zip(layers, choose(macs, macs=share * whole), strict=True):
        np.testing.assert_array_equal(option.kept(price), wanted)


def test_a_way_that_is_dear_is_not_taken_and_one_that_costs_nothing_always():
    layers = toys(2)
    dear = [[d, Option(10 * d.fixed, r.candidates), p] for d, r, p in layers]
    free = [[d, Option(0.0, Candidates(r.candidates.scores, np.ones(3), 0, 0)), p]
            for d, r, p in layers]  # fmt: skip
    budget = 0.6 * sum(options[0].fixed for options in layers)
    assert 1 not in choose_options(dear, budget)[0]
    assert spent(free, *choose_options(free, budget))[1] == 0
    assert choose_options(layers, 10 * budget)[0] == (0, 0, 0)  # there is time for all


def test_too_little_time_is_refused_with_what_is_missing():
    with pytest.raises(MoeeError, match=r"budget of time.*ms too few"):
        choose_options([[Option(0.5)], [Option(0.3)]], 0.75)
