from __future__ import annotations

import itertools

import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.experts.variance_share import rank_neurons, variance_for_macs

VARIANCE = np.random.default_rng(0).gamma(0.5, size=(4, 30))
SHARES = [0.05, 0.3, 0.5, 0.9, 0.99, 1.0]


def smallest_set(variance, p):
    """Neurons taken one at a time, the most variable first, until they hold a share p."""
    left = sorted(range(len(variance)), key=lambda i: (-variance[i], i))
    taken = [left.pop(0)]
    while left and sum(variance[taken]) < p * sum(variance) - 1e-9:
        taken.append(left.pop(0))
    return sorted(taken)


@pytest.mark.parametrize("p", SHARES)
def test_an_expert_keeps_the_fewest_neurons_that_hold_its_share_of_variance(p):
    kept = rank_neurons(VARIANCE).kept(p)
    assert [ids.tolist() for ids in kept] == [smallest_set(row, p) for row in VARIANCE]


def test_no_smaller_set_would_do():
    variance = VARIANCE[:1, :8]
    size = rank_neurons(variance).sizes(0.7)[0]
    best = max(sum(c) for c in itertools.combinations(variance[0], size - 1))
    assert best < 0.7 * variance.sum()


def test_a_larger_share_never_keeps_fewer_and_contains_the_smaller():
    ranking = rank_neurons(VARIANCE)
    for small, large in itertools.pairwise(SHARES):
        for few, many in zip(ranking.kept(small), ranking.kept(large), strict=True):
            assert set(few) <= set(many)


def test_the_whole_variance_keeps_every_neuron_even_those_that_never_change():
    variance = VARIANCE.copy()
    variance[:, 5:] = 0
    assert rank_neurons(variance).sizes(1.0).tolist() == [30] * 4
    assert max(rank_neurons(variance).sizes(0.999)) <= 5


def test_every_expert_keeps_a_neuron():
    assert rank_neurons(VARIANCE).sizes(0.0).tolist() == [1] * 4


def test_equally_variable_neurons_are_kept_in_their_order():
    kept = rank_neurons(np.array([[1.0, 2, 1, 1]])).kept(0.7)
    assert kept[0].tolist() == [0, 1, 2]


def test_an_expert_without_any_variance_keeps_everything():
    assert rank_neurons(np.zeros((2, 6))).sizes(0.9).tolist() == [6, 6]


def cost(p):
    return 100 + 10 * int(rank_neurons(VARIANCE).sizes(p).sum())


@pytest.mark.parametrize("reduction", [0.1, 0.28, 0.6, 0.8])
def test_bisection_finds_the_largest_share_within_the_budget(reduction):
    budget = (1 - reduction) * cost(1.0)
    p = variance_for_macs(cost, dense=cost(1.0), reduction=reduction)
    affordable = [q for q in np.linspace(0, 1, 4001) if cost(q) <= budget]
    assert cost(p) <= budget < cost(p + 1e-9)
    assert p >= max(affordable) - 1e-12


def test_a_budget_for_everything_keeps_everything():
    assert variance_for_macs(cost, dense=2 * cost(1.0), reduction=0.4) == 1.0


def test_a_budget_below_one_neuron_each_is_refused_with_what_can_be_had():
    most = 1 - cost(0.0) / cost(1.0)
    with pytest.raises(MoeeError, match=f"at most {most:.1%}") as error:
        variance_for_macs(cost, dense=cost(1.0), reduction=0.95)
    assert "95.0%" in error.value.expected
