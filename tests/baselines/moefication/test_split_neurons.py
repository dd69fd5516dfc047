import numpy as np
import pytest
import torch

from moee_analysis.baselines.common.equal_parts import METHODS, divide_graph
from moee_analysis.baselines.moefication.split_neurons import coactivation, graph_edges

RNG = np.random.default_rng(0)


def activations(count=35):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(0))


def slow(hidden):
    """The definition, neuron by neuron."""
    fired, total = hidden.relu().numpy(), np.zeros((12, 12))
    for start in range(0, len(fired), 8):
        for one, other in np.ndindex(12, 12):
            together = sum(a[one] * a[other] for a in fired[start : start + 8])
            total[one, other] += min(1, together)
    return total


def firing_in_groups(groups, size, *, tokens=800):
    """Activations of neurons that fire in groups, one for every 8 tokens; group of each neuron."""
    truth = RNG.permutation(np.repeat(np.arange(groups), size))
    now = np.repeat(RNG.integers(groups, size=tokens // 8), 8)
    noise = RNG.normal(size=(tokens, groups * size))
    fires = truth == now[:, None]
    return torch.from_numpy(np.where(fires, np.abs(noise), -0.1 + 0.2 * (noise > 1.5))), truth


@pytest.mark.parametrize("count", [35, 32, 3])
def test_it_is_what_the_definition_says_of_tokens_in_any_blocks(count):
    hidden = activations(count)
    found = coactivation([hidden])
    np.testing.assert_allclose(found, slow(hidden), rtol=1e-5)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(coactivation([hidden[:24], hidden[24:]]), found)
    torch.testing.assert_close(coactivation([hidden.relu()]), found)


def test_edges_are_counted_in_units_of_the_lowest_decile_that_is_not_zero():
    together = torch.zeros(10, 10)
    together[:, 5:] = torch.arange(1.0, 51.0).reshape(10, 5)
    deciles = np.percentile(together.numpy(), range(10, 101, 10))
    unit = 0.99 * deciles[deciles > 0][0]
    weights = graph_edges(together)
    assert weights.dtype == np.int64
    for row, column in np.ndindex(10, 10):
        value = 0 if row == column else int(float(together[row, column]) / unit)
        assert weights[row, column] == value
    assert not graph_edges(coactivation([-activations().abs()])).any()  # neurons that never fire


@pytest.mark.parametrize("method", METHODS)
def test_neurons_that_fire_together_become_one_expert(method):
    if method == "metis":
        pytest.importorskip("pymetis")
    hidden, truth = firing_in_groups(8, 6)
    expert_of = divide_graph(graph_edges(coactivation([hidden])), 8, method=method)
    assert all(len(set(truth[expert_of == expert])) == 1 for expert in range(8))
