from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.extraction.experts.expert_statistics import ExpertTally, statistics_of
from moee_analysis.extraction.experts.neuron_scores import eliminated, score
from moee_analysis.extraction.experts.obs import elimination_costs
from moee_analysis.extraction.record.accumulate import summed_alone
from moee_analysis.extraction.record.fisher import DAMPING, PRIOR
from tests.helpers.makers import sample_of
from tests.helpers.planted import Made, assigned, layer_of

DIM, HIDDEN, ROWS = 5, 9, 60
ORDERS = ("magnitude", "variance", "weighted", "obs")
MEMBERS = np.random.default_rng(1).integers(-1, 2, size=ROWS)
EVERYONE = np.arange(ROWS)
CUTS = (7, 31)


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
        position=np.arange(ROWS, dtype=np.int32) % 6,
    )


@pytest.fixture
def scored(tmp_path):
    """A function that scores the neurons of a layer's experts, from what is known of them."""

    def score_of(sample, *, order, metric="outputs", members=MEMBERS, prefix=(), among=None):
        layer = layer_of(sample)
        assignment = assigned(members, dim=DIM, prefix=prefix, experts=2 - len(prefix))
        tally = ExpertTally(layer.site, assignment, gradients=metric == "fisher")
        known, costs = statistics_of(tally, summed_alone(tally, layer)), {"mlp": None}
        if order == "obs":
            made, left = Made([layer], tmp_path, cuts=CUTS), None
            if among is not None:
                left = {"mlp": among}
            costs = eliminated(made, {"mlp": assignment}, {"mlp": known}, among=left)
        return score(layer.mlp, known, order=order, costs=costs["mlp"], among=among)

    return score_of


MLP = layer_of(drawn()).mlp


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


def test_magnitude_is_the_product_of_a_neuron_s_weights_whatever_the_data(scored):
    found = scored(drawn(), order="magnitude").neurons
    W1, W2 = MLP.fc1.weight.numpy(), MLP.fc2.weight.numpy()
    assert len(found) == 2
    for row in found:
        expected = [np.linalg.norm(W1[j]) * np.linalg.norm(W2[:, j]) for j in range(HIDDEN)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_variance_is_that_of_the_expert_s_tokens(scored):
    sample = drawn()
    found = scored(sample, order="variance").neurons
    for expert, row in enumerate(found):
        np.testing.assert_allclose(row, tokens_of(sample, expert).var(axis=0), rtol=1e-6)


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_weighted_is_what_dropping_a_neuron_does_to_the_outputs(scored, metric):
    sample = drawn(metric)
    found = scored(sample, order="weighted", metric=metric).neurons
    W2 = MLP.fc2.weight.double().numpy()
    for expert, row in enumerate(found):
        tokens = tokens_of(sample, expert)
        Q = metric_of(sample, expert, metric)
        for j in range(HIDDEN):
            wrong = np.outer(tokens[:, j] - tokens[:, j].mean(), W2[:, j])
            lost = np.einsum("ti,ik,tk->t", wrong, Q, wrong).mean()
            assert row[j] == pytest.approx(lost, rel=1e-4)


def eliminated_by_hand(sample, expert, metric, among=None):
    covariance = torch.from_numpy(np.cov(tokens_of(sample, expert).T, bias=True))
    half = np.linalg.cholesky(metric_of(sample, expert, metric)).T
    return elimination_costs(
        covariance, torch.from_numpy(half) @ MLP.fc2.weight.double(), among=among
    )


AMONG = np.array([True, False, True, True, False, True, True, False, True])


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
@pytest.mark.parametrize("among", [None, AMONG])
def test_obs_is_elimination_in_the_metric(scored, metric, among):
    sample = drawn(metric)
    found = scored(sample, order="obs", metric=metric, among=among).neurons
    left = None if among is None else torch.from_numpy(among)
    for expert, row in enumerate(found):
        expected = eliminated_by_hand(sample, expert, metric, left)
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-3, atol=1e-6)
        assert among is None or not row[~among].any()


@pytest.mark.parametrize("order", ["magnitude", "variance", "weighted"])
def test_neurons_that_are_gone_score_nothing_and_the_others_what_they_did(scored, order):
    found, whole = (scored(drawn(), order=order, among=a).neurons for a in (AMONG, None))
    np.testing.assert_array_equal(found, np.where(AMONG, whole, 0))


@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_an_error_counts_as_much_as_the_metric_s_mean_eigenvalue(scored, metric):
    sample = drawn(metric)
    weight = scored(sample, order="variance", metric=metric).weight
    expected = [np.trace(metric_of(sample, e, metric)) / DIM for e in range(2)]
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_kinds_of_tokens_have_metrics_of_their_own(scored):
    """An expert of the leading tokens and one of all others: each is its own prior."""
    sample = drawn("fisher")
    everything = np.zeros(ROWS, dtype=int)
    found = scored(sample, order="variance", metric="fisher", members=everything, prefix=(0,))
    for kind, weight in enumerate(found.weight):
        own = np.flatnonzero((sample.position > 0) == kind)
        Q = information(sample, own) / len(own)
        assert weight == pytest.approx((1 + DAMPING) * np.trace(Q) / DIM / 2, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["outputs", "fisher"])
def test_scores_are_exact_numbers_of_every_expert(scored, order, metric):
    found = scored(drawn(metric), order=order, metric=metric)
    assert found.neurons.shape == (2, HIDDEN)
    assert found.weight.shape == (2,)
    assert all(values.dtype == np.float64 for values in vars(found).values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["outputs", "fisher"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_expert_of_one_token_or_none_has_finite_scores(scored, order, metric, tokens):
    members = np.zeros(ROWS, dtype=int)
    members[:tokens] = 1
    found = scored(drawn(), order=order, metric=metric, members=members)
    assert np.isfinite(found.neurons).all()
    assert order == "magnitude" or found.neurons[1].max() < 1e-30


def test_nothing_to_eliminate_is_no_pass(tmp_path):
    made = Made([layer_of(drawn())], tmp_path)
    assert eliminated(made, {}, {}) == {}
    assert made.reads == []
