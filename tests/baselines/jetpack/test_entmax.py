from __future__ import annotations

import pytest
import torch

from moee_analysis.baselines.jetpack.entmax import entmax15


def by_bisection(logits):
    """Weights max(x / 2 - tau, 0)^2 of the tau, found by halving, with which they sum to 1."""
    halves = logits.double() / 2
    low, high = halves.amax(-1, keepdim=True) - 1, halves.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        much = (halves - tau).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(much, tau, low), torch.where(much, high, tau)
    return (halves - low).clamp(min=0).square()


def logits(spread, *, seed=0, shape=(3, 4, 12)):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("spread", [0.01, 1, 5, 1000])
def test_it_is_what_bisection_finds(spread):
    x = logits(spread)
    torch.testing.assert_close(entmax15(x), by_bisection(x))
    torch.testing.assert_close(entmax15(x.float()).sum(-1), torch.ones(3, 4))


def test_what_lags_behind_gets_nothing_and_close_logits_share_like_a_softmax():
    assert (entmax15(logits(5)) == 0).float().mean() > 0.5
    assert (entmax15(logits(0.01)) > 0).all()
    alone = entmax15(torch.tensor([0.0, 9.0, 1.0]))
    assert alone.tolist() == [0, 1, 0]


def test_equal_logits_share_equally():
    torch.testing.assert_close(entmax15(torch.zeros(2, 5)), torch.full((2, 5), 0.2))
    tied = entmax15(torch.tensor([3.0, 3.0, -9.0]))
    torch.testing.assert_close(tied, torch.tensor([0.5, 0.5, 0.0]))


def test_a_constant_added_changes_nothing():
    torch.testing.assert_close(entmax15(logits(2) + 7), entmax15(logits(2)))


@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_gradients_are_those_of_finite_differences(spread):
    x = logits(spread, shape=(2, 7)).requires_grad_()
    assert torch.autograd.gradcheck(entmax15, x)


def test_a_single_weight_left_has_no_gradient_and_no_nan():
    x = torch.tensor([100.0, 0.0, 0.0], requires_grad=True)
    entmax15(x)[0].backward()
    assert x.grad.tolist() == [0, 0, 0]
