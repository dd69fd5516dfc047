import numpy as np
import pytest
import torch

from moee_analysis.moe.kernels import ALIGNED, group_experts, join_experts


def draw(seed, experts=12, hidden=30):
    """Experts of random neurons and shares, the last two with the same neurons."""
    rng = np.random.default_rng(seed)
    kept = rng.random((experts, hidden)) < 0.5
    kept[-1] = kept[-2]
    return kept, rng.dirichlet(np.ones(experts))


def cost(kept, shares, groups):
    """Neurons that are computed for a token, on average over the shares."""
    return sum(shares[members].sum() * kept[members].any(axis=0).sum() for members in groups)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_the_cheapest_there_is_and_costs_more(seed):
    kept, shares = draw(seed)
    steps = [join_experts(kept, shares, count) for count in range(11, 0, -1)]
    assert [10, 11] in join_experts(kept, shares, 12)  # the same neurons: together in any case
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
    assert len(groups.stops) == min(count or 12, 11)
    assert groups.neurons.shape[1] == groups.kept.shape[1] == -(-max(groups.widths) // 16) * ALIGNED
    for group, width in enumerate(groups.widths):
        members = groups.order[groups.group == group].tolist()
        neurons = groups.neurons[group, :width].tolist()
        assert neurons == np.flatnonzero(kept[members].any(axis=0)).tolist()
        assert groups.uniform[group] == kept[np.ix_(members, neurons)].all()
    assert group_experts(torch.zeros(3, 4), torch.ones(3) / 3, 3).widths == [0]
