import numpy as np
import pytest
import torch

from moee_analysis.extraction.config import CHOICES
from moee_analysis.extraction.experts.layer_experts import LayerExperts, StatisticsAccumulator
from moee_analysis.extraction.experts.neuron_scores import elimination_costs, score_neurons
from moee_analysis.extraction.record.fisher import DAMPING, PRIOR
from tests.helpers.layers import Made, assigned, computed, layer_of, random_layer, repeated

DIM, HIDDEN, ROWS = 5, 9, 60
ORDERS, METRICS = CHOICES["order"], CHOICES["metric"]
MEMBERS = np.random.default_rng(1).integers(-1, 2, size=ROWS)
CUTS = (7, 31)


def drawn(metric="outputs"):
    """Tokens of two experts and of none; as in a recipe, all of them where gradients count."""
    weights = (1, 2, 3) if metric == "outputs" else (1,)
    return random_layer(rows=ROWS, dim=DIM, hidden=HIDDEN, weights=weights).sample


MLP = layer_of(drawn()).mlp


@pytest.fixture
def scored(tmp_path):
    """A function that scores the neurons of a layer's two experts."""

    def score_of(sample, *, order, metric="outputs", members=MEMBERS):
        layer, assignment = layer_of(sample), assigned(members, dim=DIM, experts=2)
        accumulator = StatisticsAccumulator(layer.site, assignment, gradients=metric == "fisher")
        statistics = computed(accumulator, layer)
        experts = LayerExperts(layer.site, 6, partition=assignment.partition, statistics=statistics)
        made = Made([layer], tmp_path, CUTS)
        return score_neurons(made, [experts], order=order, metric=metric)["mlp"]

    return score_of


def find_metric(sample, expert, metric):
    """Half of an expert's Fisher information, mixed with that of everyone, and damped."""
    if metric == "outputs":
        return np.eye(DIM)
    g = sample.gradients(np.arange(ROWS)).astype(float)
    products = np.einsum("pti,ptj->tij", g, g) / len(g)
    own = products[expert == MEMBERS]
    Q = (own.sum(axis=0) + PRIOR * products.mean(axis=0)) / (len(own) + PRIOR)
    return (Q + DAMPING * np.trace(Q) / DIM * np.eye(DIM)) / 2


def test_magnitude_is_the_product_of_a_neuron_s_weights_whatever_the_data(scored):
    W1, W2 = MLP.fc1.weight.numpy(), MLP.fc2.weight.numpy()
    expected = [np.linalg.norm(W1[j]) * np.linalg.norm(W2[:, j]) for j in range(HIDDEN)]
    np.testing.assert_allclose(scored(drawn(), order="magnitude"), [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_weighted_is_what_dropping_a_neuron_does_to_the_outputs(scored, metric):
    sample, W2 = drawn(metric), MLP.fc2.weight.double().numpy()
    for expert, row in enumerate(scored(sample, order="weighted", metric=metric)):
        tokens, Q = repeated(sample, expert == MEMBERS), find_metric(sample, expert, metric)
        for j in range(HIDDEN):
            wrong = np.outer(tokens[:, j] - tokens[:, j].mean(), W2[:, j])
            lost = np.einsum("ti,ik,tk->t", wrong, Q, wrong).mean()
            assert row[j] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_obs_is_elimination_in_the_metric(scored, metric):
    sample, W2 = drawn(metric), MLP.fc2.weight.double()
    for expert, row in enumerate(scored(sample, order="obs", metric=metric)):
        covariance = torch.from_numpy(np.cov(repeated(sample, expert == MEMBERS).T, bias=True))
        half = torch.from_numpy(np.linalg.cholesky(find_metric(sample, expert, metric)).T)
        expected = elimination_costs(covariance, half @ W2)
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_scores_are_finite_exact_numbers_of_every_expert(scored, order, metric, tokens):
    members = np.zeros(ROWS, dtype=int)
    members[:tokens] = 1
    found = scored(drawn(), order=order, metric=metric, members=members)
    assert found.shape == (2, HIDDEN)
    assert found.dtype == np.float64
    assert np.isfinite(found).all()
    assert bool(found[1].max() < 1e-30) is (tokens < 2 and order != "magnitude")
