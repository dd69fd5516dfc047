from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import count_parameters
from moee_analysis.moe.layer import (
    MoeMlp,
    Readout,
    all_mlps,
    moe_layers,
    moe_names,
    replace_module,
)
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, TokenKindRouter
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN = 6, 10
EXPERTS = [np.array([0, 2, 3]), np.array([2, 5]), np.array([8])]
KEPT = [0, 2, 3, 5, 8]
SHARES = np.array([0.5, 0.25, 0.25])
NONE = np.array([], dtype=np.int64)
WITH_EMPTY = [EXPERTS[0], NONE, EXPERTS[1]]
DISJOINT = [np.array([0, 2]), NONE, np.array([3, 7, 9])]


class TopTwo(CosineRouter):
    """Two experts for each token."""

    def forward(self, x):
        return (x.reshape(-1, x.shape[-1]) @ self.centres.T).topk(2, dim=1).indices


class ClsApart(TokenKindRouter):
    """The first token of an image has an expert of its own."""

    def __init__(self, centres):
        super().__init__((0,), CosineRouter(centres[1:]), tokens=5)


def made(*, router=CosineRouter, experts=EXPERTS, bias=True, readout=None):
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN, bias=bias).double()
    centres = torch.randn(len(experts), DIM, dtype=torch.float64)
    return mlp, MoeMlp(mlp, router(centres), experts, SHARES[: len(experts)], readout)


def refitted(weight, *, shift=True):
    """A readout of random values, with one W2 for all experts or with their own."""
    rng = torch.Generator().manual_seed(1)
    shapes = {"dense": None, "shared": (DIM, HIDDEN), "own": (3, DIM, HIDDEN)}
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    return Readout(
        None if shapes[weight] is None else draw(*shapes[weight]), draw(3, DIM) if shift else None
    )


def masked(mlp, layer, experts, x, readout):
    """Each token through the dense MLP, the hidden neurons that its experts lack set to zero."""
    out = []
    chosen = iter(layer.router(x).tolist())
    for token in x.reshape(-1, DIM):
        hidden = mlp.act(mlp.fc1(token))
        total = torch.zeros(DIM, dtype=x.dtype) if mlp.fc2.bias is None else mlp.fc2.bias.clone()
        for expert in next(chosen):
            mask = torch.tensor([float(n in experts[expert]) for n in range(HIDDEN)])
            weight = mlp.fc2.weight if readout.weight is None else readout.weight
            weight = weight[expert] if weight.ndim == 3 else weight
            total = total + weight @ (mask * hidden)
            total = total if readout.shift is None else total + readout.shift[expert]
        out.append(total)
    return torch.stack(out).reshape(x.shape)


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


@pytest.mark.parametrize("router", [CosineRouter, TopTwo])
def test_usage_is_how_many_tokens_have_an_expert(router):
    _, layer = made(router=router, experts=WITH_EMPTY)
    chosen = layer.router(torch.randn(4, 5, DIM, dtype=torch.float64))
    expected = [sum(expert in row for row in chosen.tolist()) for expert in range(3)]
    usage = layer.usage(chosen)
    assert usage.dtype == torch.float64
    assert usage.tolist() == expected
    assert layer.usage(chosen[:0]).tolist() == [0, 0, 0]


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


# Other weights and shifts


@pytest.mark.parametrize("weight", ["dense", "shared", "own"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("experts", [EXPERTS, WITH_EMPTY, DISJOINT, [NONE] * 3])
@pytest.mark.parametrize("case", [
    (CosineRouter, (9, DIM)),
    (CosineRouter, (2, 3, 4, DIM)),
    (TopTwo, (2, 5, DIM)),
    (ClsApart, (3, 5, DIM)),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_a_refitted_layer_equals_a_masked_dense_one(weight, shift, experts, case, bias):
    router, shape = case
    readout = refitted(weight, shift=shift)
    mlp, layer = made(router=router, experts=experts, bias=bias, readout=readout)
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), masked(mlp, layer, experts, x, readout))


def test_an_expert_of_no_neurons_is_a_constant():
    readout = refitted("own")
    mlp, layer = made(experts=[NONE] * 3, readout=readout)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    wanted = (mlp.fc2.bias + readout.shift)[layer.router(x)[:, 0]].reshape(x.shape)
    assert torch.equal(layer(x), wanted)
    assert layer.expert_sizes == [0, 0, 0]
    assert layer.macs_per_token() == layer.router.macs


def test_only_used_columns_of_other_weights_are_stored():
    readout = refitted("shared")
    _, layer = made(readout=readout)
    assert torch.equal(layer.fc2.weight, readout.weight[:, KEPT])
    assert "columns" not in layer.state_dict()

    readout = refitted("own")
    mlp, layer = made(readout=readout)
    parts = [readout.weight[expert][:, ids] for expert, ids in enumerate(EXPERTS)]
    assert torch.equal(layer.fc2.weight, torch.cat(parts, dim=1))
    assert layer.columns.tolist() == list(range(6))
    assert torch.equal(layer.fc1.weight, mlp.fc1.weight[KEPT])


def test_own_weights_of_experts_that_share_nothing_are_stored_as_shared_ones():
    _, layer = made(experts=DISJOINT, readout=refitted("own", shift=False))
    assert layer.state_dict().keys() == made(experts=DISJOINT)[1].state_dict().keys()


@pytest.mark.parametrize("shift", [True, False])
def test_parameters_are_counted_as_stored(shift):
    rows, shifts, router = len(KEPT) * (DIM + 1) + DIM, 3 * DIM * shift, 3 * DIM
    _, layer = made(readout=refitted("own", shift=shift))
    assert count_parameters(layer) == rows + DIM * (3 + 2 + 1) + shifts + router
    _, layer = made(readout=refitted("shared", shift=shift))
    assert count_parameters(layer) == rows + DIM * len(KEPT) + shifts + router


def test_other_weights_do_not_change_the_cost():
    _, layer = made(readout=refitted("own"))
    assert layer.macs_per_token() == made()[1].macs_per_token()


@pytest.mark.parametrize("weight", ["shared", "own"])
@pytest.mark.parametrize("router", [CosineRouter, TopTwo, ClsApart])
def test_gradients_of_other_weights_and_shifts_are_right(weight, router):
    _, layer = made(router=router, experts=WITH_EMPTY, readout=refitted(weight))
    names, values = zip(*layer.named_parameters(), strict=True)
    assert "shift" in names
    values = [value.detach().clone().requires_grad_() for value in values]
    x = torch.randn(1, 5, DIM, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_shifts_learn_where_no_expert_has_neurons():
    _, layer = made(experts=[NONE] * 3, readout=refitted("own"))
    x = torch.randn(4, 5, DIM, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    used = torch.bincount(layer.router(x)[:, 0], minlength=3).double()
    torch.testing.assert_close(layer.shift.grad, used[:, None].expand(3, DIM))
    assert not x.grad.any()


@pytest.mark.parametrize("experts", [WITH_EMPTY, [NONE] * 3])
@pytest.mark.parametrize("weight", ["shared", "own"])
def test_mixed_precision_works_with_empty_experts(weight, experts):
    _, layer = made(experts=experts, readout=refitted(weight))
    layer.float()
    x = torch.randn(50, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    close = torch.isclose(found.float(), layer(x), atol=0.1).all(dim=1)
    assert close.float().mean() > 0.9
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_readout_is_copied_and_as_trainable_as_the_layer():
    readout = refitted("own")
    before = readout.shift.clone()
    mlp, layer = made(readout=readout)
    layer.shift.data.zero_()
    assert torch.equal(readout.shift, before)
    assert layer.shift.requires_grad
    frozen = mlp.requires_grad_(requires_grad=False)
    layer = MoeMlp(frozen, ConstantRouter(), EXPERTS, SHARES, readout)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(("weight", "shift", "named"), [
    ((HIDDEN, DIM), None, "weight"),
    ((2, DIM, HIDDEN), None, "weight"),
    (None, (2, DIM), "shift"),
    (None, (DIM,), "shift"),
])  # fmt: skip
def test_a_readout_of_another_shape_is_refused(weight, shift, named):
    readout = Readout(*(None if shape is None else torch.zeros(shape) for shape in (weight, shift)))
    with pytest.raises(MoeeError, match=f"the readout's {named} of shape"):
        made(readout=readout)


# Layers in a model


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
