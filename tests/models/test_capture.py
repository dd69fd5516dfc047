import pytest
import torch
from torch import nn

from moee_analysis.models.capture import capture, watch
from tests.helpers.models import hooks_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
def test_what_a_module_takes_and_gives_is_the_obvious(model, side):
    taken = model[1](model[0](X))
    pair = {"inputs": taken, "outputs": model(X)}
    with capture(model, ["2"], side) as found:
        model(X)
    got = found["2"] if side == "both" else [found["2"]]
    expected = pair.values() if side == "both" else [pair[side]]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_value_can_be_exchanged(model, side):
    expected = model[2](torch.zeros(2, 4)) if side == "inputs" else torch.zeros(2, 2)
    with watch({2: model[2]}, lambda _, value: torch.zeros_like(value), side):
        assert torch.equal(model(X), expected)


def test_hooks_come_off_whatever_happens(model):
    with pytest.raises(RuntimeError, match="shapes"), capture(model, ["0", "2"], "outputs"):
        model(X[:, :1])
    assert not hooks_of(model)
