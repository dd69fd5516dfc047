from __future__ import annotations

import numpy as np
import pytest

from moee_analysis.moe.kernels.grouping import expected_neurons, grouped

KEPT = np.array([
    [1, 1, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1],
    [1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 1],
    [0, 0, 0, 0, 1, 1],
], dtype=bool)  # fmt: skip
EVEN = np.full(5, 0.2)


def drawn(seed, experts=12, hidden=30):
    rng = np.random.default_rng(seed)
    return rng.random((experts, hidden)) < 0.5, rng.dirichlet(np.ones(experts))


def numbers(groups):
    return sorted(sorted(group.experts.tolist()) for group in groups)


def test_experts_of_the_same_neurons_are_always_together():
    assert numbers(grouped(KEPT, EVEN, 5)) == [[0], [1, 3], [2], [4]]


def test_what_adds_least_is_joined_first():
    assert numbers(grouped(KEPT, EVEN, 3)) == [[0, 2], [1, 3], [4]]
    assert numbers(grouped(KEPT, EVEN, 2)) == [[0, 2], [1, 3, 4]]
    # where hardly a token uses expert 4, it costs less to let it compute neuron 3 as well
    assert numbers(grouped(KEPT, np.array([0.3, 0.3, 0.2, 0.19, 0.01]), 3)) == [[0], [1, 3, 4], [2]]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("seed", range(3))
def test_every_expert_is_in_one_group_with_all_its_neurons(count, seed):
    kept, shares = drawn(seed)
    groups = grouped(kept, shares, count)
    assert len(groups) == min(count, 12)
    assert sorted(np.concatenate([group.experts for group in groups])) == list(range(12))
    for group in groups:
        assert group.neurons.tolist() == np.flatnonzero(kept[group.experts].any(axis=0)).tolist()
        assert np.array_equal(group.kept, kept[group.experts][:, group.neurons])


@pytest.mark.parametrize("seed", range(3))
def test_fewer_groups_compute_more_neurons(seed):
    kept, shares = drawn(seed)
    expected = [expected_neurons(grouped(kept, shares, n), shares) for n in range(12, 0, -1)]
    assert expected == sorted(expected)
    assert expected[0] == pytest.approx(shares @ kept.sum(axis=1))
    assert expected[-1] == pytest.approx(kept.any(axis=0).sum())


def test_each_step_is_the_cheapest_there_is():
    kept, shares = drawn(3, experts=6)
    before = grouped(kept, shares, 6)
    after = expected_neurons(grouped(kept, shares, 5), shares)
    costs = [
        (shares[a] + shares[b]) * (kept[a] | kept[b]).sum()
        + sum(shares[e] * kept[e].sum() for e in range(6) if e not in (a, b))
        for a in range(6)
        for b in range(a)
    ]
    assert len(before) == 6
    assert after == pytest.approx(min(costs))


def test_experts_without_neurons_make_a_group_without_neurons():
    groups = grouped(np.zeros((3, 4), dtype=bool), np.full(3, 1 / 3), 3)
    assert [group.neurons.tolist() for group in groups] == [[]]
