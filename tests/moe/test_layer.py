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
    without_routing,
)
from moee_analysis.moe.routers import ConstantRouter, CosineRouter
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN = 6, 10
EXPERTS = [np.array([0, 2, 3]), np.array([2, 5]), np.array([8])]
KEPT = [0, 2, 3, 5, 8]
SHARES = np.array([0.5, 0.25, 0.25])


def build(readout=None):
    torch.manual_seed(0)
    mlp, centres = Mlp(DIM, HIDDEN).double(), torch.randn(len(EXPERTS), DIM, dtype=torch.float64)
    return mlp, MoeMlp(mlp, CosineRouter(centres), EXPERTS, SHARES, readout)


@pytest.fixture
def readout():
    draw = torch.Generator().manual_seed(1)
    return Readout(*(torch.randn(*s, generator=draw).double() for s in ((DIM, HIDDEN), (3, DIM))))


def test_neurons_are_stored_once_and_those_that_no_expert_uses_are_gone(readout):
    mlp, layer = build()
    assert layer.kept.tolist() == KEPT
    for expert, ids in enumerate(EXPERTS):
        assert layer.kept[layer.expert_neurons(expert)].tolist() == ids.tolist()
    assert (layer.expert_sizes, layer.n_experts, layer.hidden_dense) == ([3, 2, 1], 3, HIDDEN)
    assert torch.equal(layer.fc1.weight, mlp.fc1.weight[KEPT])
    assert torch.equal(layer.fc1.bias, mlp.fc1.bias[KEPT])
    assert torch.equal(layer.fc2.weight, mlp.fc2.weight[:, KEPT])
    refitted = build(readout=readout)[1]
    assert torch.equal(refitted.fc2.weight, readout.weight[:, KEPT])
    stored = len(KEPT) * (2 * DIM + 1) + DIM
    for each, shifts in ((layer, 0), (refitted, 3 * DIM)):
        assert sum(t.numel() for t in each.parameters()) == stored + shifts
        assert count_parameters(each) == stored + shifts + 3 * DIM  # the router's centres


def test_a_layer_is_a_copy_that_trains_if_the_dense_one_does(readout):
    mlp, layer = build(readout=readout)
    before = mlp.fc1.weight.clone(), readout.shift.clone()
    layer.fc1.weight.data.zero_()
    layer.shift.data.zero_()
    assert torch.equal(mlp.fc1.weight, before[0])
    assert torch.equal(readout.shift, before[1])
    assert all(p.requires_grad for p in layer.parameters())
    mlp.requires_grad_(requires_grad=False)
    frozen = MoeMlp(mlp, ConstantRouter(), EXPERTS, SHARES, readout)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_cost_is_the_router_and_the_neurons_weighted_by_use(readout):
    for layer in (build()[1], build(readout=readout)[1]):
        assert layer.macs_per_token() == 3 * DIM + 2 * DIM * (0.5 * 3 + 0.25 * 2 + 0.25 * 1)
        assert layer.macs_per_token(torch.tensor([0.0, 0.0, 1.0])) == 3 * DIM + 2 * DIM


@pytest.mark.parametrize("chosen", [[[0], [2], [0], [0]], [[0, 1], [2, 0]], []])
def test_usage_is_how_many_tokens_have_an_expert(chosen):
    usage = build()[1].usage(torch.tensor(chosen, dtype=torch.int64))
    assert usage.dtype == torch.float64
    assert usage.tolist() == [sum(expert in row for row in chosen) for expert in range(3)]


@pytest.mark.parametrize(("shapes", "named"), [
    (((HIDDEN, DIM), None), "weight"), (((3, DIM, HIDDEN), None), "weight"),
    ((None, (2, DIM)), "shift"), ((None, (DIM,)), "shift"),
])  # fmt: skip
def test_a_readout_of_another_shape_is_refused(shapes, named):
    wrong = Readout(*(None if shape is None else torch.zeros(shape) for shape in shapes))
    with pytest.raises(MoeeError, match=f"the readout's {named} of shape"):
        build(readout=wrong)


def test_routed_layers_are_counted_as_in_the_dense_model():
    model = toy_moe(toy_vit(), layers={0, 2})
    assert list(moe_layers(model)) == [0, 2]
    assert moe_names(model) == {0: "blocks.0.mlp", 2: "blocks.2.mlp"}
    assert [type(m).__name__ for m in all_mlps(model).values()] == ["MoeMlp", "Mlp", "MoeMlp"]
    assert moe_layers(toy_vit()) == {}


def test_a_layer_of_one_expert_without_routing_is_an_mlp_of_the_same_outputs():
    shift = Readout(shift=torch.ones(1, 32))
    model, x = toy_moe(toy_vit(), layers={2}), torch.randn(2, 3, 32, 32)
    layer = MoeMlp(model.blocks[0].mlp, ConstantRouter(), [np.arange(9)], np.ones(1), shift)
    replace_module(model, "blocks.0.mlp", layer)
    plain = without_routing(model)
    assert list(moe_layers(plain)) == [2]
    torch.testing.assert_close(plain(x), model(x))
