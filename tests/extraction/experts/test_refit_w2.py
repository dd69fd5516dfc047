from __future__ import annotations

import pytest
import torch

from moee_analysis.extraction.experts.refit_w2 import mean_shift, shared_readout

EXPERTS, TOKENS, HIDDEN, DIM = 3, 80, 12, 5
RIDGE = 1e-12


def drawn(seed=0):
    """Hidden activations of each expert's tokens, W2, kept neurons, and a weight per expert."""
    draw = torch.Generator().manual_seed(seed)
    normal = {"generator": draw, "dtype": torch.float64}
    mixing = torch.randn(EXPERTS, HIDDEN, HIDDEN, **normal)
    tokens = torch.randn(EXPERTS, TOKENS, HIDDEN, **normal) @ mixing
    tokens = tokens + 3 * torch.randn(EXPERTS, 1, HIDDEN, **normal)
    kept = torch.rand(EXPERTS, HIDDEN, generator=draw) < 0.5
    weights = [0.5, 2.0, 1.0]
    return tokens, torch.randn(DIM, HIDDEN, **normal), kept, weights


def covariances_of(tokens):
    return [a.T.cov(correction=0).double() for a in tokens]


def shared(tokens, W2, kept, weights, **settings):
    """One W2 for all experts, fitted to explicit tokens."""
    covariances = covariances_of(tokens)
    across = sum(w * C * D for w, C, D in zip(weights, covariances, kept, strict=True))
    within = sum(w * C * D * D[:, None] for w, C, D in zip(weights, covariances, kept, strict=True))
    sums = {"across": across, "within": within}
    return shared_readout(W2, sums, kept, tokens.mean(dim=1), **settings)


def refitted(tokens, W2, kept, weights, *, ridge=RIDGE):
    """W2 of every expert, and the shifts."""
    found = shared(tokens, W2, kept, weights, ridge=ridge)
    return found.weight.expand(len(kept), -1, -1), found.shift


def error(tokens, W2, kept, weights, readout):
    """Weighted squared error of the outputs, token by token."""
    total = 0.0
    for a, mask, weight, own, shift in zip(tokens, kept, weights, *readout, strict=True):
        wrong = a @ W2.T - ((a * mask) @ own.T + shift)
        total += weight * float(wrong.square().sum(dim=1).mean())
    return total


# Least squares on explicit tokens


@pytest.mark.parametrize("seed", range(3))
def test_a_shared_readout_is_the_least_squares_fit_of_all_tokens_at_once(seed):
    tokens, W2, kept, weights = drawn(seed)
    used = kept.any(dim=0)
    rows, targets = [], []
    for a, mask, weight in zip(tokens, kept, weights, strict=True):
        centred = (weight / TOKENS) ** 0.5 * (a - a.mean(dim=0))
        rows.append((centred * mask)[:, used])
        targets.append(centred @ W2.T)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    weight, _ = refitted(tokens, W2, kept, weights)
    torch.testing.assert_close(weight[0][:, used], expected, rtol=1e-6, atol=1e-6)


def test_shifts_make_the_mean_output_of_every_expert_right():
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(tokens, W2, kept, weights)
    for a, mask, own, extra in zip(tokens, kept, weight, shift, strict=True):
        outputs = (a * mask) @ own.T + extra
        torch.testing.assert_close(outputs.mean(dim=0), (a @ W2.T).mean(dim=0))


def test_a_mean_shift_is_the_mean_of_what_is_dropped():
    tokens, W2, kept, _ = drawn()
    shift = mean_shift(W2, kept, tokens.mean(dim=1))
    for a, mask, extra in zip(tokens, kept, shift, strict=True):
        torch.testing.assert_close(extra, ((a * ~mask) @ W2.T).mean(dim=0))


# How good they are


@pytest.mark.parametrize("seed", range(5))
def test_the_more_is_refitted_the_less_is_wrong(seed):
    tokens, W2, kept, weights = drawn(seed)
    dense = W2.expand(EXPERTS, -1, -1)
    readouts = {
        "none": (dense, torch.zeros(EXPERTS, DIM)),
        "shift": (dense, mean_shift(W2, kept, tokens.mean(dim=1))),
        "shared": refitted(tokens, W2, kept, weights),
    }
    errors = [error(tokens, W2, kept, weights, readout) for readout in readouts.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[-2]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_shared_readout_is_better(seed):
    tokens, W2, kept, weights = drawn(seed)
    weight, shift = refitted(tokens, W2, kept, weights)
    least = error(tokens, W2, kept, weights, (weight, shift))
    for _ in range(20):
        other = (weight + 0.1 * torch.randn(DIM, HIDDEN), shift + 0.1 * torch.randn(DIM))
        assert error(tokens, W2, kept, weights, other) > least


def test_an_expert_that_weighs_more_is_fitted_better():
    tokens, W2, kept, _ = drawn()
    wrong = []
    for weights in ([1.0, 1.0, 1.0], [100.0, 1.0, 1.0]):
        readout = refitted(tokens, W2, kept, weights)
        wrong.append(error(tokens, W2, kept, [1.0, 0.0, 0.0], readout))
    assert wrong[1] < 0.9 * wrong[0]


def test_a_large_ridge_leaves_the_dense_weights():
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(tokens, W2, kept, weights, ridge=1e9)
    torch.testing.assert_close(weight[0], W2, rtol=0, atol=1e-6)
    torch.testing.assert_close(shift, mean_shift(W2, kept, tokens.mean(dim=1)), rtol=0, atol=1e-5)


# Where nothing is to be done


def test_with_all_neurons_kept_nothing_changes():
    tokens, W2, kept, weights = drawn()
    found = shared(tokens, W2, torch.ones_like(kept), weights)
    torch.testing.assert_close(found.weight.expand(EXPERTS, -1, -1), W2.expand(EXPERTS, -1, -1))
    torch.testing.assert_close(found.shift, torch.zeros(EXPERTS, DIM, dtype=torch.float64))


def test_an_expert_without_neurons_gives_its_mean_output():
    tokens, W2, kept, weights = drawn()
    kept[1] = False
    _, shift = refitted(tokens, W2, kept, weights)
    torch.testing.assert_close(shift[1], (tokens[1] @ W2.T).mean(dim=0))


def test_a_layer_without_neurons_keeps_finite_weights():
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(tokens, W2, torch.zeros_like(kept), weights)
    torch.testing.assert_close(weight, W2.expand(EXPERTS, -1, -1))
    torch.testing.assert_close(shift, tokens.mean(dim=1) @ W2.T)


def test_an_expert_without_tokens_changes_nothing_for_the_others():
    tokens, W2, kept, weights = drawn()
    nothing = torch.zeros_like(tokens[:1])
    more = (torch.cat([tokens, nothing]), W2, torch.cat([kept, kept[:1]]), [*weights, 0.0])
    with_it, without = shared(*more), shared(tokens, W2, kept, weights)
    assert torch.isfinite(with_it.weight).all()
    torch.testing.assert_close(with_it.weight[: len(without.weight)], without.weight)
    torch.testing.assert_close(with_it.shift[:EXPERTS], without.shift)
    assert not with_it.shift[EXPERTS].any()


def test_a_readout_has_the_precision_of_the_layer():
    tokens, W2, kept, weights = drawn()
    exact = shared(tokens, W2, kept, weights)
    single = shared(tokens.float(), W2.float(), kept, weights)
    assert single.weight.dtype == single.shift.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)
