import pytest
import torch

from moee_analysis.extraction.experts import neuron_scores
from moee_analysis.extraction.experts.neuron_scores import elimination_costs

ALONE = 10**9  # blocks so small that one neuron goes at a time
OUTPUTS, HIDDEN, TOKENS = 5, 9, 40


def drawn(seed, *, hidden=HIDDEN, tokens=TOKENS):
    """Centred hidden activations of some tokens that depend on each other, and a readout."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=draw, dtype=torch.float64)
    activations = torch.randn(tokens, hidden, generator=draw, dtype=torch.float64) @ mixing
    readout = torch.randn(OUTPUTS, hidden, generator=draw, dtype=torch.float64)
    return activations - activations.mean(dim=0), readout


def covariance_of(activations):
    return activations.T @ activations / len(activations)


def refitted_error(activations, readout, kept, *, ridge):
    """Squared error per token of the best readout of the ``kept`` neurons, by least squares.

    The ridge pulls the output weights to those of the dense layer.
    """
    r = ridge * covariance_of(activations).diagonal().mean()
    pull = r.sqrt() * torch.eye(activations.shape[1], dtype=torch.float64)
    rows = torch.cat([activations / len(activations) ** 0.5, pull])
    targets = rows @ readout.T
    fitted = torch.linalg.lstsq(rows[:, kept], targets).solution
    return float((rows[:, kept] @ fitted - targets).square().sum())


def one_by_one(activations, readout, *, ridge):
    """Try every neuron at every step; the order of removal, and the error after each."""
    left, gone, errors = list(range(activations.shape[1])), [], []
    while left:
        tried = {
            j: refitted_error(activations, readout, [i for i in left if i != j], ridge=ridge)
            for j in left
        }
        cheapest = min(tried, key=tried.get)
        left.remove(cheapest)
        gone.append(cheapest)
        errors.append(tried[cheapest])
    return gone, torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 10, 14, 17, 19])
def test_costs_are_those_of_trying_every_neuron_at_every_step(seed, ridge):
    activations, readout = drawn(seed)
    gone, errors = one_by_one(activations, readout, ridge=ridge)
    raised = errors.diff(prepend=errors.new_zeros(1))
    if seed >= 10 and ridge == 1e-3:  # a refit makes a later removal cheaper than the last
        assert (raised.diff() < 0).any()
    costs = elimination_costs(covariance_of(activations), readout, ridge=ridge, block=ALONE)
    torch.testing.assert_close(costs[gone], raised.cummax(dim=0).values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hidden", [1, 24, 60])
def test_removing_everything_costs_all_that_varies(hidden):
    activations, readout = drawn(0, hidden=hidden)
    whole = (activations @ readout.T).square().sum() / TOKENS
    costs = elimination_costs(covariance_of(activations), readout, ridge=1e-9, block=ALONE)
    assert costs.shape == (hidden,)
    assert (costs >= 0).all()
    assert float(costs.sum()) >= float(whole) * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_two_at_a_time_are_nearly_as_good_as_one_at_a_time(seed):
    activations, readout = drawn(seed, hidden=48, tokens=200)
    given = covariance_of(activations), readout
    orders = [elimination_costs(*given, **o).argsort().tolist() for o in ({"block": ALONE}, {})]
    for gone in (12, 24, 36):
        slow, fast = (
            refitted_error(activations, readout, order[gone:], ridge=1e-3) for order in orders
        )
        assert fast <= 1.2 * slow


def test_what_does_not_vary_or_is_not_read_or_is_there_twice_costs_nothing():
    activations, readout = drawn(2)
    activations[:, [3, 5]] = 0
    activations[:, 4] = activations[:, 7]
    costs = elimination_costs(covariance_of(activations), readout, ridge=1e-9)
    assert {3, 5} < set(costs.argsort()[:3].tolist())
    assert costs[[3, 5]].max() < 1e-6 * costs.max()
    assert costs[[4, 7]].min() < 1e-6 * costs[[4, 7]].max()
    costs = elimination_costs(torch.zeros(6, 6), torch.randn(3, 6))
    assert torch.isfinite(costs).all()
    assert costs.max() < 1e-30
    unread = elimination_costs(covariance_of(drawn(4)[0]), torch.zeros(OUTPUTS, HIDDEN))
    assert not unread.any()


@pytest.mark.parametrize("squeeze", [0, 0.5, 2])
def test_when_columns_are_left_out_makes_no_difference(monkeypatch, squeeze):
    activations, readout = drawn(1, hidden=60, tokens=200)
    given = covariance_of(activations), readout.clone()
    costs = elimination_costs(*given)
    monkeypatch.setattr(neuron_scores, "SQUEEZE", squeeze)
    torch.testing.assert_close(elimination_costs(*given), costs, rtol=1e-9, atol=0)
    assert torch.equal(given[1], readout)


@pytest.mark.parametrize("block", [ALONE, 3])
def test_the_order_of_the_neurons_makes_no_difference(block):
    activations, readout = drawn(5)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))
    costs = elimination_costs(covariance_of(activations), readout, block=block)
    permuted = covariance_of(activations[:, order])
    again = elimination_costs(permuted, readout[:, order], block=block)
    torch.testing.assert_close(again, costs[order])
