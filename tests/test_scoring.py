from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.elimination import elimination_costs
from moee_analysis.fisher import DAMPING, PRIOR
from moee_analysis.scoring import score
from tests.makers import sample_of

DIM, HIDDEN, ROWS = 5, 9, 60
ORDERS = ("magnitude", "variance", "weighted", "obs")
MEMBERS = np.random.default_rng(1).integers(-1, 2, size=ROWS)
EVERYONE = np.arange(ROWS)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp(DIM, HIDDEN).requires_grad_(requires_grad=False)


def drawn(metric="outputs"):
    """Tokens of two experts and of none; as in a recipe, all of them where gradients count."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(HIDDEN, HIDDEN))
    weight = rng.integers(1, 4, size=ROWS) if metric == "outputs" else np.ones(ROWS)
    return sample_of(
        (rng.normal(1, 1, size=(ROWS, HIDDEN)) @ mixing).astype(np.float32),
        inputs=rng.normal(size=(ROWS, DIM)).astype(np.float16),
        weight=weight.astype(np.float32),
        gradients=rng.normal(size=(2, ROWS, DIM)).astype(np.float16),
    )


def scored(mlp, sample, *, order, metric="outputs"):
    return score(mlp, sample, MEMBERS, [EVERYONE] * 2, order=order, metric=metric)


def tokens_of(sample, expert):
    """Hidden activations of an expert's tokens, repeated by their weight."""
    own = expert == MEMBERS
    return np.repeat(sample.hidden[own].astype(float), sample.weight[own].astype(int), axis=0)


def information(sample, rows):
    """Sum of g g^T over tokens, mean over probes."""
    g = sample.gradients(rows).astype(float)
    return sum(np.outer(v, v) for probe in g for v in probe) / len(g)


def fisher_metric(sample, expert):
    """Half of an expert's Fisher information, mixed with that of everyone, and damped."""
    own, everyone = np.flatnonzero(expert == MEMBERS), EVERYONE
    prior = information(sample, everyone) / len(everyone)
    Q = (information(sample, own) + PRIOR * prior) / (len(own) + PRIOR)
    return (Q + DAMPING * np.trace(Q) / DIM * np.eye(DIM)) / 2


def metric_of(sample, expert, metric):
    return np.eye(DIM) if metric == "outputs" else fisher_metric(sample, expert)


def test_magnitude_is_the_product_of_a_neuron_s_weights_whatever_the_data(mlp):
    found = scored(mlp, drawn(), order="magnitude").neurons
    W1, W2 = mlp.fc1.weight.numpy(), mlp.fc2.weight.numpy()
    for row in found:
        expected = [np.linalg.norm(W1[j]) * np.linalg.norm(W2[:, j]) for j in range(HIDDEN)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_variance_is_that_of_the_expert_s_tokens(mlp):
    sample = drawn()
    found = scored(mlp, sample, order="variance").neurons
    for expert, row in enumerate(found):
        np.testing.assert_allclose(row, tokens_of(sample, expert).var(axis=0), rtol=1e-6)


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_weighted_is_what_dropping_a_neuron_does_to_the_outputs(mlp, metric):
    sample = drawn(metric)
    found = scored(mlp, sample, order="weighted", metric=metric).neurons
    W2 = mlp.fc2.weight.double().numpy()
    for expert, row in enumerate(found):
        tokens = tokens_of(sample, expert)
        Q = metric_of(sample, expert, metric)
        for j in range(HIDDEN):
            wrong = np.outer(tokens[:, j] - tokens[:, j].mean(), W2[:, j])
            lost = np.einsum("ti,ik,tk->t", wrong, Q, wrong).mean()
            assert row[j] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_obs_is_elimination_in_the_metric(mlp, metric):
    sample = drawn(metric)
    found = scored(mlp, sample, order="obs", metric=metric).neurons
    for expert, row in enumerate(found):
        covariance = torch.from_numpy(np.cov(tokens_of(sample, expert).T, bias=True))
        half = np.linalg.cholesky(metric_of(sample, expert, metric)).T
        readout = torch.from_numpy(half) @ mlp.fc2.weight.double()
        torch.testing.assert_close(
            torch.from_numpy(row), elimination_costs(covariance, readout), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_an_error_counts_as_much_as_the_metric_s_mean_eigenvalue(mlp, metric):
    sample = drawn(metric)
    weight = scored(mlp, sample, order="variance", metric=metric).weight
    expected = [np.trace(metric_of(sample, e, metric)) / DIM for e in range(2)]
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_kinds_of_tokens_have_metrics_of_their_own(mlp):
    sample = drawn("fisher")
    kinds = [np.flatnonzero(expert == MEMBERS) for expert in range(2)]
    found = score(mlp, sample, MEMBERS, kinds, order="variance", metric="fisher")
    for own, weight in zip(kinds, found.weight, strict=True):
        Q = information(sample, own) / len(own)
        assert weight == pytest.approx((1 + DAMPING) * np.trace(Q) / DIM / 2, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_scores_come_with_the_mean_activations_of_every_expert(mlp, order, metric):
    sample = drawn(metric)
    found = scored(mlp, sample, order=order, metric=metric)
    assert found.neurons.shape == found.means.shape == (2, HIDDEN)
    assert found.weight.shape == (2,)
    for expert, row in enumerate(found.means):
        np.testing.assert_allclose(row, tokens_of(sample, expert).mean(axis=0), rtol=1e-6)
    assert all(values.dtype == np.float64 for values in vars(found).values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["outputs", "fisher"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_expert_of_one_token_or_none_has_finite_scores(mlp, order, metric, tokens):
    members = np.zeros(ROWS, dtype=int)
    members[:tokens] = 1
    found = score(mlp, drawn(), members, [EVERYONE] * 2, order=order, metric=metric)
    assert np.isfinite(found.neurons).all()
    assert order == "magnitude" or found.neurons[1].max() < 1e-30
