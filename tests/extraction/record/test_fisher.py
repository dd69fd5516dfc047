import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.extraction.record.fisher import (
    input_root,
    output_gradients,
    products,
    root,
)
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from tests.helpers.layers import sample_of
from tests.helpers.models import pixels_of, toy_vit

DIM, HIDDEN = 5, 8
MANY = 48  # probes, images and draws that make a mean exact enough


def some_metric():
    half = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return half @ half.T


def test_a_root_squared_is_the_metric_also_of_a_singular_one():
    found = root(some_metric())
    torch.testing.assert_close(found @ found, some_metric())
    torch.testing.assert_close(found, found.T)
    flat = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(root(flat), flat.sqrt())
    torch.testing.assert_close(root(flat - 1e-12 * torch.eye(4)), flat.sqrt())


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
    with watch({0: site.module(model)}, lambda _, output: output + delta, "outputs"):
        after = model(x).log_softmax(dim=1)
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
