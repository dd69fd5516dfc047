from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.moe import blocked_mlp as dense_layers
from moee_analysis.moe.blocked_mlp import BlockedMlp, compute_in_blocks
from moee_analysis.moe.kernels.dispatch import BLOCK
from moee_analysis.moe.layer import all_mlps, moe_layers
from moee_analysis.utils import matmul as products
from tests.helpers.images import toy_images
from tests.helpers.models import lively, pixels_of, same_models, toy_moe, toy_swin, toy_vit
from tests.helpers.runs import best, quick

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


@pytest.fixture
def always_onednn(monkeypatch):
    monkeypatch.setattr(products, "onednn_speed", lambda threads: 2.0)
    monkeypatch.setattr(dense_layers, "LITTLE", 0)


@pytest.mark.usefixtures("always_onednn")
@pytest.mark.parametrize("tokens", [1, BLOCK, BLOCK + 3])
def test_products_of_onednn_give_what_the_mlp_gives_whatever_is_done_to_it(mlp, tokens):
    blocked, x = BlockedMlp.of(mlp.eval()), torch.randn(tokens, DIM)
    with torch.no_grad():
        for each in (blocked, copy.deepcopy(blocked)):
            torch.testing.assert_close(each(x), mlp(x))
        mlp.fc1.weight.mul_(2)
        torch.testing.assert_close(blocked(x), mlp(x))
        mlp.fc2.bias.add_(1)
        torch.testing.assert_close(blocked(x), mlp(x))
        other = Mlp(DIM, HIDDEN)
        blocked.load_state_dict(other.state_dict())
        torch.testing.assert_close(blocked(x), other(x))
        torch.testing.assert_close(blocked.double()(x.double()), other.double()(x.double()))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.usefixtures("always_onednn")
def test_activations_are_made_a_block_at_a_time(mlp, enabled, monkeypatch):
    class Noting(nn.GELU):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    seen, blocked = [], BlockedMlp.of(mlp.eval())
    blocked.act = Noting()
    with torch.no_grad():
        blocked(torch.randn(2, BLOCK + 1, DIM))
    assert seen == [BLOCK, BLOCK, 2]


@pytest.mark.usefixtures("always_onednn")
def test_hooks_inside_see_what_they_see_in_the_mlp(mlp):
    blocked, seen = BlockedMlp.of(mlp.eval()), []
    x = torch.randn(2, BLOCK, DIM)
    with torch.no_grad():
        handle = blocked.act.register_forward_hook(lambda *args: seen.append(args[2]))
        blocked(x)
        handle.remove()
        blocked(x)
        torch.testing.assert_close(seen, [mlp.act(mlp.fc1(x))])


@pytest.mark.usefixtures("always_onednn")
def test_dropout_drops_in_training():
    blocked, x = BlockedMlp.of(Mlp(DIM, HIDDEN, drop=0.9)), torch.randn(5, DIM)
    with torch.no_grad():
        assert not torch.equal(blocked.train()(x), blocked(x))
        assert torch.equal(blocked.eval()(x), blocked(x))


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
