from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.layers import MoeMlp, all_mlps, moe_layers, moe_names, replace_module
from moee_analysis.routers import ConstantRouter, CosineRouter
from tests.toys import toy_moe, toy_vit

DIM, HIDDEN = 6, 10
EXPERTS = [np.array([0, 2, 3]), np.array([2, 5]), np.array([8])]
KEPT = [0, 2, 3, 5, 8]
SHARES = np.array([0.5, 0.25, 0.25])


class TopTwo(CosineRouter):
    """Two experts for each token."""

    def forward(self, tokens):
        return (tokens @ self.centres.T).topk(2, dim=1).indices


def made(*, router=CosineRouter, experts=EXPERTS, bias=True):
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN, bias=bias).double()
    centres = torch.randn(len(experts), DIM, dtype=torch.float64)
    return mlp, MoeMlp(mlp, router(centres), experts, SHARES[: len(experts)])


def token_by_token(mlp, layer, experts, x):
    """Each token through the dense weights of its experts' neurons, one after the other."""
    tokens = x.reshape(-1, DIM)
    out = []
    for token, chosen in zip(tokens, layer.router(tokens), strict=True):
        total = torch.zeros(DIM, dtype=x.dtype) if mlp.fc2.bias is None else mlp.fc2.bias.clone()
        for expert in chosen.tolist():
            for neuron in experts[expert]:
                before = mlp.fc1.weight[neuron] @ token
                if mlp.fc1.bias is not None:
                    before = before + mlp.fc1.bias[neuron]
                total = total + mlp.act(before) * mlp.fc2.weight[:, neuron]
        out.append(total)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("router", [CosineRouter, TopTwo])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, DIM), (2, 5, DIM), (2, 3, 4, DIM)])
def test_the_layer_equals_a_loop_over_tokens_and_dense_weights(router, bias, shape):
    mlp, layer = made(router=router, bias=bias)
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), token_by_token(mlp, layer, EXPERTS, x))


def test_all_neurons_in_every_expert_is_the_dense_layer():
    mlp, layer = made(experts=[np.arange(HIDDEN)] * 3)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x), mlp(x), rtol=0, atol=1e-12)


def test_an_expert_that_gets_no_token_changes_nothing():
    mlp, _ = made()
    layer = MoeMlp(mlp, ConstantRouter(1), EXPERTS, SHARES)
    x = torch.randn(4, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x), token_by_token(mlp, layer, EXPERTS, x))


def test_no_tokens_give_no_output():
    _, layer = made()
    assert layer(torch.zeros(0, 5, DIM, dtype=torch.float64)).shape == (0, 5, DIM)


def test_neurons_that_no_expert_uses_are_gone():
    mlp, layer = made()
    state = layer.state_dict()
    assert state["fc1.weight"].shape == (len(KEPT), DIM)
    assert state["fc2.weight"].shape == (DIM, len(KEPT))
    assert torch.equal(layer.fc1.weight, mlp.fc1.weight[KEPT])
    assert torch.equal(layer.fc1.bias, mlp.fc1.bias[KEPT])
    assert torch.equal(layer.fc2.weight, mlp.fc2.weight[:, KEPT])
    assert sum(t.numel() for t in layer.parameters()) == len(KEPT) * (2 * DIM + 1) + DIM


def test_a_neuron_shared_by_experts_is_stored_once_and_listed_by_both():
    _, layer = made()
    assert layer.kept.tolist() == KEPT
    for expert, ids in enumerate(EXPERTS):
        assert layer.kept[layer.expert_neurons(expert)].tolist() == ids.tolist()
    assert layer.expert_sizes == [3, 2, 1]
    assert (layer.n_experts, layer.hidden_dense) == (3, HIDDEN)


def test_the_dense_layer_is_not_changed():
    mlp, layer = made()
    before = mlp.fc1.weight.clone()
    layer.fc1.weight.data.zero_()
    assert torch.equal(mlp.fc1.weight, before)


@pytest.mark.parametrize("router", [CosineRouter, TopTwo])
def test_gradients_of_weights_and_input_are_right(router):
    _, layer = made(router=router)
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_a_trainable_layer_stays_trainable_and_a_frozen_one_frozen():
    mlp, layer = made()
    assert all(p.requires_grad for p in layer.parameters())
    frozen = MoeMlp(mlp.requires_grad_(requires_grad=False), ConstantRouter(), EXPERTS, SHARES)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_cost_is_the_router_and_the_neurons_weighted_by_use():
    _, layer = made()
    assert layer.macs_per_token() == 3 * DIM + 2 * DIM * (0.5 * 3 + 0.25 * 2 + 0.25 * 1)
    measured = torch.tensor([0.0, 0.0, 1.0])
    assert layer.macs_per_token(measured) == 3 * DIM + 2 * DIM


def test_mixed_precision_works_as_with_the_dense_layer():
    _, layer = made()
    layer.float()
    x = torch.randn(50, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    # a few tokens may change their expert at lower precision
    close = torch.isclose(found.float(), layer(x), atol=0.05).all(dim=1)
    assert close.float().mean() > 0.9
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_routed_layers_are_counted_as_in_the_dense_model():
    model = toy_moe(toy_vit(), layers={0, 2})
    assert list(moe_layers(model)) == [0, 2]
    assert moe_names(model) == {0: "blocks.0.mlp", 2: "blocks.2.mlp"}
    assert [type(m).__name__ for m in all_mlps(model).values()] == ["MoeMlp", "Mlp", "MoeMlp"]
    assert moe_layers(toy_vit()) == {}


def test_a_module_is_replaced_by_its_name():
    model = toy_vit()
    replace_module(model, "blocks.1.mlp", torch.nn.Identity())
    assert isinstance(model.blocks[1].mlp, torch.nn.Identity)
    replace_module(model, "head", torch.nn.Identity())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
