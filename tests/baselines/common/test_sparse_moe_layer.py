from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.sparse_moe_layer import SparseMlp
from moee_analysis.baselines.common.sparse_routers import ExpertChoiceRouter, Gate, TopKRouter
from moee_analysis.moe.expert_layer import ExpertLayer

DIM, HIDDEN, EXPERTS, IMAGES, TOKENS = 6, 10, 4, 3, 10

ROUTERS = {
    "top_k": lambda gate: TopKRouter(gate, k=2),
    "dropping": lambda gate: TopKRouter(gate, k=2, capacity=0.5),
    "gates": lambda gate: TopKRouter(gate, k=1, renormalise=False),
    "expert_choice": lambda gate: ExpertChoiceRouter(gate, capacity=2.0),
    "little": lambda gate: ExpertChoiceRouter(gate, capacity=0.4, renormalise=False),
}


def made(name):
    """MLPs of random weights, and the layer that has them as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(DIM, HIDDEN).double() for _ in range(EXPERTS)]
    gate = Gate(torch.randn(EXPERTS, DIM, dtype=torch.float64))
    return mlps, SparseMlp(ROUTERS[name](gate), ExpertMlps(mlps, mlps[0].act)).eval()


def tokens(*shape):
    shape = shape or (IMAGES, TOKENS, DIM)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masked(mlps, layer, x):
    """All tokens through all experts; what the router does not say is multiplied by zero."""
    flat = x.flatten(0, -2)
    routed = layer.router(x)
    weights = x.new_zeros(len(flat), EXPERTS)
    weights[routed.tokens, routed.experts] = routed.weights
    made_by = torch.stack([mlp(flat) for mlp in mlps], dim=1)
    return (weights[..., None] * made_by).sum(1).reshape(x.shape)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", ["own", "random", "constant"])
@pytest.mark.parametrize("shape", [(IMAGES, TOKENS, DIM), (2, 3, 4, DIM)])
def test_the_layer_equals_all_experts_masked(name, kind, shape):
    mlps, layer = made(name)
    if kind != "own":
        layer.router = layer.random_router(1) if kind == "random" else layer.constant_router()
    x = tokens(*shape)
    torch.testing.assert_close(layer(x), masked(mlps, layer, x))


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_those_of_all_experts_masked(name):
    mlps, layer = made(name)
    x = tokens()
    layer(x).square().sum().backward()
    grad = layer.router.gate.weight.grad.clone()
    layer.router.zero_grad()
    masked(mlps, layer, x).square().sum().backward()
    torch.testing.assert_close(grad, layer.router.gate.weight.grad, atol=1e-9, rtol=1e-6)
    for e, mlp in enumerate(mlps):
        torch.testing.assert_close(layer.experts.fc1_weight.grad[e], mlp.fc1.weight.grad)


def test_tokens_that_no_expert_takes_get_zeros():
    _, layer = made("little")
    x = tokens()
    taken = torch.zeros(IMAGES * TOKENS, dtype=torch.bool)
    taken[layer.router(x).tokens] = True
    output = layer(x).flatten(0, 1)
    assert not taken.all()
    assert (output[~taken] == 0).all()
    assert (output[taken] != 0).any(dim=1).all()


@pytest.mark.parametrize(("name", "pairs"), [
    ("top_k", 2 * IMAGES * TOKENS), ("gates", IMAGES * TOKENS),
    ("expert_choice", 2 * IMAGES * TOKENS), ("little", IMAGES * EXPERTS),
])  # fmt: skip
def test_only_what_is_routed_is_computed(name, pairs):
    _, layer = made(name)
    x = tokens()
    for router in (layer.router, layer.random_router(0), layer.constant_router()):
        layer.router = router
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        macs = pairs * 2 * DIM * HIDDEN + IMAGES * TOKENS * DIM * EXPERTS
        assert counter.get_total_flops() == 2 * macs
        usage = layer.usage(router(x))
        assert usage.dtype == torch.float64
        assert usage.sum().item() == pairs


def test_usage_counts_tokens_of_each_expert():
    _, layer = made("dropping")
    routed = layer.router(tokens())
    expected = [sum(routed.experts.tolist()[i] == e for i in range(len(routed.experts)))
                for e in range(EXPERTS)]  # fmt: skip
    assert isinstance(layer, ExpertLayer)
    assert layer.usage(routed).tolist() == expected
    assert max(expected) <= IMAGES * round(0.5 * 2 * TOKENS / EXPERTS)


@pytest.mark.parametrize("name", ROUTERS)
def test_state_is_restored(name):
    _, layer = made(name)
    _, other = made(name)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(layer.state_dict())
    x = tokens()
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_keep_their_precision_under_autocast(name):
    _, layer = made(name)
    layer, x = layer.float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, routed = layer(x), layer.router(x)
    assert found.dtype == torch.bfloat16
    assert routed.weights.dtype == torch.float32
    assert found.isfinite().all()
