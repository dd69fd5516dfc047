from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.experts.refit_w2 import (
    RefitTally,
    each_readout,
    mean_shift,
    shared_readout,
)
from moee_analysis.extraction.record import layer_tokens as recorded
from moee_analysis.extraction.record.accumulate import summed_alone
from tests.helpers.makers import sample_of
from tests.helpers.planted import added_up, agree, assigned, layer_of, parts_of

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
    """One W2 for all experts; the fit of :func:`each` ignores the weights."""
    covariances = covariances_of(tokens)
    across = sum(w * C * D for w, C, D in zip(weights, covariances, kept, strict=True))
    within = sum(w * C * D * D[:, None] for w, C, D in zip(weights, covariances, kept, strict=True))
    sums = {"across": across, "within": within}
    return shared_readout(W2, sums, kept, tokens.mean(dim=1), **settings)


def each(tokens, W2, kept, _weights, **settings):
    return each_readout(W2, covariances_of(tokens), kept, tokens.mean(dim=1), **settings)


REFITS = (shared, each)


def refitted(fit, tokens, W2, kept, weights, *, ridge=RIDGE):
    """W2 of every expert, and the shifts, as ``fit`` finds them."""
    found = fit(tokens, W2, kept, weights, ridge=ridge)
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
    weight, _ = refitted(shared, tokens, W2, kept, weights)
    torch.testing.assert_close(weight[0][:, used], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_readout_each_is_the_least_squares_fit_of_the_expert_s_tokens(seed):
    tokens, W2, kept, weights = drawn(seed)
    weight, _ = refitted(each, tokens, W2, kept, weights)
    for a, mask, own in zip(tokens, kept, weight, strict=True):
        centred = a - a.mean(dim=0)
        expected = torch.linalg.lstsq(centred[:, mask], centred @ W2.T).solution.T
        torch.testing.assert_close(own[:, mask], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fit", REFITS)
def test_shifts_make_the_mean_output_of_every_expert_right(fit):
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(fit, tokens, W2, kept, weights)
    for a, mask, own, extra in zip(tokens, kept, weight, shift, strict=True):
        outputs = (a * mask) @ own.T + extra
        torch.testing.assert_close(outputs.mean(dim=0), (a @ W2.T).mean(dim=0))


def test_a_mean_shift_is_the_mean_of_what_is_dropped():
    tokens, W2, kept, _ = drawn()
    shift = mean_shift(W2, kept, tokens.mean(dim=1))
    for a, mask, extra in zip(tokens, kept, shift, strict=True):
        torch.testing.assert_close(extra, ((a * ~mask) @ W2.T).mean(dim=0))


def test_a_shared_readout_of_one_expert_is_its_own():
    tokens, W2, kept, weights = drawn()
    one = (tokens[:1], W2, kept[:1], weights[:1])
    for found, own in zip(refitted(shared, *one), refitted(each, *one), strict=True):
        torch.testing.assert_close(found, own)


# How good they are


@pytest.mark.parametrize("seed", range(5))
def test_the_more_is_refitted_the_less_is_wrong(seed):
    tokens, W2, kept, weights = drawn(seed)
    dense = W2.expand(EXPERTS, -1, -1)
    readouts = {
        "none": (dense, torch.zeros(EXPERTS, DIM)),
        "shift": (dense, mean_shift(W2, kept, tokens.mean(dim=1))),
        "shared": refitted(shared, tokens, W2, kept, weights),
        "each": refitted(each, tokens, W2, kept, weights),
    }
    errors = [error(tokens, W2, kept, weights, readout) for readout in readouts.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[-2] < 0.9 * errors[-3]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_shared_readout_is_better(seed):
    tokens, W2, kept, weights = drawn(seed)
    weight, shift = refitted(shared, tokens, W2, kept, weights)
    least = error(tokens, W2, kept, weights, (weight, shift))
    for _ in range(20):
        other = (weight + 0.1 * torch.randn(DIM, HIDDEN), shift + 0.1 * torch.randn(DIM))
        assert error(tokens, W2, kept, weights, other) > least


def test_an_expert_that_weighs_more_is_fitted_better():
    tokens, W2, kept, _ = drawn()
    wrong = []
    for weights in ([1.0, 1.0, 1.0], [100.0, 1.0, 1.0]):
        readout = refitted(shared, tokens, W2, kept, weights)
        wrong.append(error(tokens, W2, kept, [1.0, 0.0, 0.0], readout))
    assert wrong[1] < 0.9 * wrong[0]


def test_a_large_ridge_leaves_the_dense_weights():
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(shared, tokens, W2, kept, weights, ridge=1e9)
    torch.testing.assert_close(weight[0], W2, rtol=0, atol=1e-6)
    torch.testing.assert_close(shift, mean_shift(W2, kept, tokens.mean(dim=1)), rtol=0, atol=1e-5)


# Where nothing is to be done


@pytest.mark.parametrize("fit", REFITS)
def test_with_all_neurons_kept_nothing_changes(fit):
    tokens, W2, kept, weights = drawn()
    found = fit(tokens, W2, torch.ones_like(kept), weights)
    torch.testing.assert_close(found.weight.expand(EXPERTS, -1, -1), W2.expand(EXPERTS, -1, -1))
    torch.testing.assert_close(found.shift, torch.zeros(EXPERTS, DIM, dtype=torch.float64))


@pytest.mark.parametrize("fit", REFITS)
def test_an_expert_without_neurons_gives_its_mean_output(fit):
    tokens, W2, kept, weights = drawn()
    kept[1] = False
    _, shift = refitted(fit, tokens, W2, kept, weights)
    torch.testing.assert_close(shift[1], (tokens[1] @ W2.T).mean(dim=0))


@pytest.mark.parametrize("fit", REFITS)
def test_a_layer_without_neurons_keeps_finite_weights(fit):
    tokens, W2, kept, weights = drawn()
    weight, shift = refitted(fit, tokens, W2, torch.zeros_like(kept), weights)
    torch.testing.assert_close(weight, W2.expand(EXPERTS, -1, -1))
    torch.testing.assert_close(shift, tokens.mean(dim=1) @ W2.T)


@pytest.mark.parametrize("fit", REFITS)
def test_an_expert_without_tokens_changes_nothing_for_the_others(fit):
    tokens, W2, kept, weights = drawn()
    nothing = torch.zeros_like(tokens[:1])
    more = (torch.cat([tokens, nothing]), W2, torch.cat([kept, kept[:1]]), [*weights, 0.0])
    with_it, without = fit(*more), fit(tokens, W2, kept, weights)
    assert torch.isfinite(with_it.weight).all()
    torch.testing.assert_close(with_it.weight[: len(without.weight)], without.weight)
    torch.testing.assert_close(with_it.shift[:EXPERTS], without.shift)
    assert not with_it.shift[EXPERTS].any()


@pytest.mark.parametrize("fit", REFITS)
def test_a_readout_has_the_precision_of_the_layer(fit):
    tokens, W2, kept, weights = drawn()
    exact = fit(tokens, W2, kept, weights)
    single = fit(tokens.float(), W2.float(), kept, weights)
    assert single.weight.dtype == single.shift.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


# Sums over the tokens of a layer

ROWS = 90
MEMBERS = np.random.default_rng(1).integers(-1, EXPERTS, size=ROWS)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), 6)
    sample = sample_of(
        rng.normal(2, 1, size=(ROWS, HIDDEN)).astype("f2"),
        inputs=rng.normal(size=(ROWS, DIM)).astype("f2"),
        weight=rng.integers(1, 5, size=ROWS).astype("f4"),
        image=image,
        position=position,
    )
    return layer_of(sample)


def tally_of(layer, *, prefix=(), everything=False):
    rng, experts = np.random.default_rng(2), len(set(prefix)) + EXPERTS
    kept = (rng.random((experts, HIDDEN)) < 0.5) | everything
    means, weights = rng.normal(2, 1, size=(experts, HIDDEN)), rng.random(experts)
    assignment = assigned(MEMBERS, dim=DIM, prefix=prefix)
    return RefitTally(layer.site, assignment, kept, means, weights)


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("prefix", [(), (0,), (0, 0), (0, 1)])
def test_sums_equal_a_slow_loop_over_the_tokens_of_every_expert(layer, monkeypatch, chunk, prefix):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    tally = tally_of(layer, prefix=prefix)
    _, members = tally.assignment.of(layer)
    across, within = np.zeros((2, HIDDEN, HIDDEN))
    for row in np.flatnonzero(members >= 0):
        expert = members[row]
        apart = layer.sample.hidden[row].astype("f8") - tally.means[expert]
        weight = tally.weights[expert] * layer.sample.weight[row]
        across += weight * np.outer(apart, apart * tally.kept[expert])
        within += weight * np.outer(apart * tally.kept[expert], apart * tally.kept[expert])
    expected = {"across": torch.from_numpy(across), "within": torch.from_numpy(within)}
    agree(summed_alone(tally, layer), expected, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(1,), (1, 30, 88), range(1, ROWS)])
@pytest.mark.parametrize("prefix", [(), (0, 1)])
def test_parts_add_up_to_one_pass(layer, cuts, prefix):
    tally = tally_of(layer, prefix=prefix)
    agree(added_up(tally, parts_of(layer, cuts)), summed_alone(tally, layer))


def test_w2_comes_back_from_sums_in_single_precision_where_all_neurons_are_kept(layer):
    """However alike the neurons are: then rounding is large beside what tells them apart."""
    hidden = layer.sample.hidden.astype("f4")
    flat = layer_of(replace(layer.sample, hidden=hidden[:, :1] * hidden[0] + 0.001 * hidden))
    tally = tally_of(flat, everything=True)
    W2 = torch.randn(DIM, HIDDEN, generator=torch.Generator().manual_seed(0))
    kept, means = torch.from_numpy(tally.kept), torch.from_numpy(tally.means).float()
    found = shared_readout(W2, summed_alone(tally, flat), kept, means)
    torch.testing.assert_close(found.weight, W2)


def test_all_that_decides_the_sums_is_among_their_facts(layer):
    tally = tally_of(layer)
    others = [
        replace(tally, kept=~tally.kept),
        replace(tally, means=tally.means + 1),
        replace(tally, weights=tally.weights + 1),
        replace(tally, assignment=assigned(MEMBERS[::-1], dim=DIM)),
    ]
    assert len({str(one.facts) for one in (tally, *others)}) == 5
