"""What runs is seen as it is, evaluated without a trace, and the same from any block on."""

import pytest
import torch
from torch import nn

from moee_analysis.models.capture import (
    block_of,
    capture,
    evaluating,
    seeing_inputs,
    starting_at,
    watch,
)
from moee_analysis.models.loading import find_mlps
from tests.helpers.models import SMALL_CONVNEXT, hooks_of, lively, toy_swin, toy_vit


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


def test_evaluating_has_no_gradients():
    model = nn.Linear(2, 2).train()
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()


# From a block on


@pytest.mark.parametrize("model", [toy_vit(), toy_swin(), lively(SMALL_CONVNEXT)], ids=type)
@torch.no_grad()
def test_from_every_block_on_the_outputs_are_the_same(model):
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    blocks = {site.name: block_of(model, site.name) for site in find_mlps(model)}
    known = {block for block in blocks.values() if block is not None}
    assert known
    with seeing_inputs(known) as entering:
        whole = model(x)
    assert entering.keys() == known
    for block in known:
        with starting_at(block, entering[block][1:3]):
            torch.testing.assert_close(model(x[1:3]), whole[1:3])
    torch.testing.assert_close(model(x), whole)
    assert hooks_of(model) == 0


def test_what_comes_before_is_not_computed_and_put_back_also_after_an_error():
    model, ran = toy_vit(), []
    before = list(model.blocks)
    for block in model.blocks:
        block.register_forward_hook(lambda block, *_: ran.append(block))
    with torch.no_grad(), starting_at(block_of(model, "blocks.2.mlp"), torch.zeros(2, 17, 32)):
        model(torch.zeros(2, 3, 32, 32))
    assert ran == [model.blocks[2]]
    block = block_of(model, "blocks.2.mlp")
    with pytest.raises(ZeroDivisionError), starting_at(block, torch.zeros(2, 17, 32)):
        _ = 1 / 0
    assert list(model.blocks) == before


def test_the_first_block_and_blocks_in_a_list_run_as_a_whole():
    model = toy_vit()
    assert block_of(model, "blocks.0.mlp") is None
    assert block_of(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), "a") is None
    # What a model does between blocks in a list is its own affair.
    model.blocks = torch.nn.ModuleList(model.blocks)
    assert block_of(model, "blocks.2.mlp") is None
