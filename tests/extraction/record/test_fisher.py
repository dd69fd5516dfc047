from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import fisher as fishers
from moee_analysis.extraction.record.fisher import (
    DAMPING,
    PRIOR,
    damped,
    expert_metrics,
    importance,
    input_root,
    output_gradients,
    products,
    root,
)
from moee_analysis.models.loading import find_mlps
from tests.helpers.layers import sample_of
from tests.helpers.models import pixels_of, toy_vit

PROBES, ROWS, DIM, HIDDEN = 3, 30, 5, 8
MANY = 48  # probes, images and draws that make a mean exact enough


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(PROBES, ROWS, DIM)).astype("f2")
    norms = rng.gamma(1.0, size=(PROBES, ROWS)).astype("f4")
    weight = rng.integers(1, 4, size=ROWS).astype("f4")
    inputs = np.zeros((ROWS, DIM), "f2")
    sample = sample_of(inputs=inputs, gradients=gradients, weight=weight)
    return replace(sample, norms=norms.T.copy())


def outer_products(sample, rows):
    """Sum over tokens of their weight times g g^T, mean over probes, one after the other."""
    total = np.zeros((DIM, DIM))
    for row in rows:
        for g in sample.gradients([row])[:, 0].astype("f8"):
            total += sample.weight[row] * np.outer(g, g) / PROBES
    return total


def some_metric(seed=0):
    half = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T


# Products, and metrics from their sums


@pytest.mark.parametrize("rows", [np.arange(ROWS), np.array([0, 3, 4, 17]), np.array([], int)])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_products_of_gradients_are_summed_as_often_as_a_token_counts(
    drawn, monkeypatch, rows, chunk
):
    monkeypatch.setattr(fishers, "CHUNK", chunk)
    expected = outer_products(drawn, rows)
    found = products(drawn, rows)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


EXPERTS = 4


def some_sums():
    """Four experts, the last without tokens; the first serves another kind than the others."""
    draw = torch.Generator().manual_seed(0)
    halves = torch.randn(EXPERTS + 2, DIM, DIM, generator=draw, dtype=torch.float64)
    squares = halves @ halves.mT
    weight = torch.tensor([40.0, 1.0, 7000.0, 0.0], dtype=torch.float64)
    fisher = weight[:, None, None] * squares[:EXPERTS]
    of_kinds = torch.tensor([40.0, 9000.0], dtype=torch.float64)
    kinds = of_kinds[:, None, None] * squares[EXPERTS:]
    return {"fisher": fisher, "kinds": kinds, "weight": weight, "of_kinds": of_kinds}


KINDS = np.array([0, 1, 1, 1])


def test_a_prior_counts_as_so_many_tokens_more():
    sums = some_sums()
    found = expert_metrics(sums, KINDS)
    for expert, kind in enumerate(KINDS):
        own, weight = sums["fisher"][expert].numpy(), float(sums["weight"][expert])
        prior = sums["kinds"][kind].numpy() / float(sums["of_kinds"][kind])
        Q = (own + PRIOR * prior) / (weight + PRIOR)
        expected = (Q + DAMPING * np.trace(Q) / DIM * np.eye(DIM)) / 2
        np.testing.assert_allclose(found[expert], expected, rtol=1e-10)


def test_without_tokens_the_metric_is_the_prior_and_without_any_of_the_kind_nothing():
    sums = some_sums()
    prior = sums["kinds"][1] / sums["of_kinds"][1]
    torch.testing.assert_close(expert_metrics(sums, KINDS)[3], damped(prior) / 2)
    nothing = {name: torch.zeros_like(values) for name, values in sums.items()}
    assert not expert_metrics(nothing, KINDS).any()


def test_a_sample_without_gradients_is_refused():
    with pytest.raises(MoeeError, match="gradients"):
        products(sample_of(np.zeros((3, 4), "f2")), np.arange(3))


def test_damping_raises_every_eigenvalue_by_a_share_of_their_mean():
    metrics = torch.stack([some_metric(seed) for seed in range(6)]).reshape(2, 3, DIM, DIM)
    for before, after in zip(metrics.flatten(0, 1), damped(metrics).flatten(0, 1), strict=True):
        values, raised = torch.linalg.eigvalsh(before), torch.linalg.eigvalsh(after)
        torch.testing.assert_close(raised, values + DAMPING * values.mean())


def test_a_root_squared_is_the_metric_also_of_a_singular_one():
    found = root(some_metric())
    torch.testing.assert_close(found @ found, some_metric())
    torch.testing.assert_close(found, found.T)
    flat = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(root(flat), flat.sqrt())
    torch.testing.assert_close(root(flat - 1e-12 * torch.eye(4)), flat.sqrt())


def test_importance_is_the_squared_length_of_each_column():
    readout = torch.randn(DIM, HIDDEN, dtype=torch.float64)
    columns = [float(w @ some_metric() @ w) for w in readout.T]
    np.testing.assert_allclose(importance(readout, some_metric()), columns, rtol=1e-10)


def test_distances_after_the_input_root_are_those_that_hidden_neurons_pass_on():
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN)
    A = input_root(mlp, some_metric())
    W1, W2 = mlp.fc1.weight.detach().double(), mlp.fc2.weight.detach().double()
    for _ in range(5):
        x, y = torch.randn(2, DIM, dtype=torch.float64)
        expected = sum(
            (W2[:, j] @ some_metric() @ W2[:, j]) * (W1[j] @ (x - y)) ** 2 for j in range(HIDDEN)
        )
        torch.testing.assert_close((A @ (x - y)).square().sum(), expected)


# What an error really costs


def divergences(model, site, x, delta):
    """KL(before || after) of each image, ``delta`` (images, tokens, dim) added to the outputs."""
    before = model(x).log_softmax(dim=1)
    hook = site.module(model).register_forward_hook(lambda _module, _args, out: out + delta)
    after = model(x).log_softmax(dim=1)
    hook.remove()
    return (before.exp() * (before - after)).sum(dim=1)


def recorded_gradients(model, site, x):
    """A sample of all tokens of ``x`` with their gradients, and each token's position."""
    g = output_gradients(model, [site], x, seeds=[(0, i) for i in range(len(x))], probes=MANY)
    images, tokens = g[site.name].shape[1:3]
    position = np.tile(np.arange(tokens), images)
    flat = g[site.name].reshape(MANY, images * tokens, -1).numpy()
    inputs = np.zeros((len(position), flat.shape[-1]), "f2")
    return sample_of(inputs=inputs, position=position, gradients=flat)


@pytest.mark.parametrize(("layer", "who"), [(0, "cls"), (1, "patches"), (1, "some")])
def test_errors_of_random_signs_cost_as_much_divergence_as_the_metric_says(layer, who):
    model = toy_vit().double()
    site, x = find_mlps(model)[layer], pixels_of(model, count=8).double()
    sample = recorded_gradients(model, site, x)
    chosen = {"cls": [0], "patches": range(1, 17), "some": [2, 5, 11]}[who]
    rows = np.flatnonzero(np.isin(sample.position, chosen))
    draw = torch.Generator().manual_seed(layer)
    error = 1e-3 * torch.randn(32, generator=draw, dtype=torch.float64)
    metric = products(sample, rows) / len(rows)
    expected = len(chosen) * float(error @ metric @ error) / 2
    costs = []
    for _ in range(MANY):
        signs = torch.zeros(8, 17, 1, dtype=torch.float64)
        drawn = torch.randint(2, (8, len(chosen), 1), generator=draw)
        signs[:, chosen] = 2 * drawn.double() - 1
        costs.append(divergences(model, site, x, signs * error).mean())
    assert float(torch.stack(costs).mean()) == pytest.approx(expected, rel=0.25)
