import numpy as np
import pytest
import torch

from moee_analysis.moe.kernels.expert_groups import ALIGNED, group_experts, join_experts

KEPT = np.array([
    [1, 1, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1],
    [1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 1],
    [0, 0, 0, 0, 1, 1],
], dtype=bool)  # fmt: skip
EVEN = np.full(5, 0.2)


def draw(seed, experts=12, hidden=30):
    rng = np.random.default_rng(seed)
    return rng.random((experts, hidden)) < 0.5, rng.dirichlet(np.ones(experts))


def cost(kept, shares, groups):
    """Neurons that are computed for a token, on average over the shares."""
    return sum(shares[members].sum() * kept[members].any(axis=0).sum() for members in groups)


@pytest.mark.parametrize(("count", "shares", "expected"), [
    (5, EVEN, [[0], [1, 3], [2], [4]]),  # experts of the same neurons are always together
    (3, EVEN, [[0, 2], [1, 3], [4]]),
    (2, EVEN, [[0, 2], [1, 3, 4]]),
    # where hardly a token uses expert 4, it costs less to let it compute neuron 3 as well
    (3, np.array([0.3, 0.3, 0.2, 0.19, 0.01]), [[0], [1, 3, 4], [2]]),
])  # fmt: skip
def test_the_cheapest_groups_are_joined_first(count, shares, expected):
    assert sorted(map(sorted, join_experts(KEPT, shares, count))) == expected


@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_the_cheapest_there_is_and_costs_more(seed):
    kept, shares = draw(seed)
    steps = [join_experts(kept, shares, count) for count in range(12, 0, -1)]
    costs = [cost(kept, shares, groups) for groups in steps]
    assert costs[0] == pytest.approx(shares @ kept.sum(axis=1))
    assert costs[-1] == pytest.approx(kept.any(axis=0).sum())
    for groups, joined in zip(steps, costs[1:], strict=False):
        pairs = [(a, b) for n, a in enumerate(groups) for b in groups[:n]]
        others = [[g for g in groups if g not in pair] + [sum(pair, [])] for pair in pairs]  # noqa: RUF017
        assert joined == pytest.approx(min(cost(kept, shares, each) for each in others))


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40, None])
@pytest.mark.parametrize("seed", range(3))
def test_every_expert_is_in_one_group_with_all_its_neurons(count, seed):
    kept, shares = draw(seed)
    groups = group_experts(torch.from_numpy(kept).float(), torch.from_numpy(shares), count)
    assert len(groups.stops) == min(count or 12, 12)
    assert sorted(groups.order.tolist()) == list(range(12))
    assert groups.order[groups.place].tolist() == list(range(12))
    assert groups.neurons.shape[1] == groups.kept.shape[1] == -(-max(groups.widths) // 16) * ALIGNED
    for place, expert in enumerate(groups.order.tolist()):
        group = int(groups.group[place])
        members = groups.order[groups.group == group].tolist()
        neurons = groups.neurons[group, : groups.widths[group]].tolist()
        assert neurons == np.flatnonzero(kept[members].any(axis=0)).tolist()
        own = groups.neurons[group][groups.kept[place] > 0].tolist()
        assert own == np.flatnonzero(kept[expert]).tolist()
        assert groups.uniform[group] == kept[np.ix_(members, neurons)].all()
    assert group_experts(torch.zeros(3, 4), torch.ones(3) / 3, 3).widths == [0]
