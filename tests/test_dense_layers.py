from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Mlp

from moee_analysis.dense_layers import BlockedMlp, compute_in_blocks
from moee_analysis.dispatch import BLOCK
from moee_analysis.extraction import extract, load
from moee_analysis.layers import all_mlps, moe_layers
from tests.makers import best, lively, pixels_of, quick, same_models
from tests.toys import toy_images, toy_moe, toy_swin, toy_vit

DIM, HIDDEN = 6, 10


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp(DIM, HIDDEN)


@pytest.mark.parametrize(
    "shape",
    [(0, DIM), (1, DIM), (BLOCK, DIM), (2 * BLOCK + 3, DIM), (3, BLOCK, DIM), (2, 40, 41, DIM)],
)
def test_any_number_of_tokens_gives_what_the_mlp_gives(mlp, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(BlockedMlp.of(mlp)(x), mlp(x))


def test_gradients_are_those_of_the_mlp(mlp):
    x = torch.randn(BLOCK + 1, DIM)
    grads = []
    for each in (mlp, BlockedMlp.of(copy.deepcopy(mlp))):
        each(x).square().sum().backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(*grads)


def test_parameters_are_shared_and_keep_their_names(mlp):
    blocked = BlockedMlp.of(mlp)
    assert dict(blocked.named_parameters()) == dict(mlp.named_parameters())
    assert dict(blocked.named_children()) == dict(mlp.named_children())
    assert not BlockedMlp.of(mlp.eval()).training


def test_compiling_needs_one_graph(mlp):
    blocked, x = BlockedMlp.of(mlp), torch.randn(2 * BLOCK, DIM)
    compiled = torch.compile(blocked, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
def test_all_dense_layers_of_a_model_are_computed_in_blocks(build):
    model = toy_moe(build(), layers={1})
    x = pixels_of(model)
    before, routed = model(x), moe_layers(model)
    compute_in_blocks(model)
    assert moe_layers(model) == routed
    kinds = {type(m) for i, m in enumerate(all_mlps(model).values()) if i not in routed}
    assert kinds == {BlockedMlp}
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("config", [best(layers=(1,), macs_reduction=0.05), quick(layers=(0, 1))])
def test_layers_that_an_extraction_leaves_dense_are_saved_and_loaded(config, tmp_path):
    model = lively()
    run = extract(model, toy_images(8), config)
    run.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert same_models(again.model, run.model)
    for each in (run, again):
        dense = [layer.name for layer in each.layers if not layer.converted]
        assert dense
        assert all(isinstance(each.model.get_submodule(name), BlockedMlp) for name in dense)
    assert not any(isinstance(module, BlockedMlp) for module in model.modules())
