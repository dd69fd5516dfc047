"""A network that starts at a block gives what the whole one gives."""

import pytest
import torch

from moee_analysis.models.capture import block_of, seeing_inputs, starting_at
from moee_analysis.models.loading import find_mlps
from tests.helpers.models import SMALL_CONVNEXT, hooks_of, lively, toy_swin, toy_vit


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
