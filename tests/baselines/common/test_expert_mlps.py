import pytest
import torch
from timm.layers import Mlp

from moee_analysis.baselines.common.replace_mlps import ExpertMlps

DIM, HIDDEN, EXPERTS = 6, 10, 3


def made(*, bias=True, drop=0.0):
    """MLPs of random weights, and the same as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(DIM, HIDDEN, bias=bias).double() for _ in range(EXPERTS)]
    return mlps, ExpertMlps(mlps, mlps[0].act, drop=drop)


def inputs(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_every_expert_is_its_mlp(bias):
    mlps, experts = made(bias=bias)
    x = inputs(2, EXPERTS, 5, DIM)
    each = [[mlp(x[image, e]) for e, mlp in enumerate(mlps)] for image in range(2)]
    torch.testing.assert_close(experts(x), torch.stack([torch.stack(row) for row in each]))


@pytest.mark.parametrize("counts", [(4, 1, 2), (0, 7, 0), (3, 3, 3), (0, 0, 0)])
def test_any_numbers_of_inputs_have_the_outputs_and_gradients_of_each_mlp(counts):
    mlps, experts = made()
    x = inputs(sum(counts), DIM)
    found, parts = experts.in_turn(x, counts), x.split(counts)
    each = torch.cat([mlp(part) for mlp, part in zip(mlps, parts, strict=True)])
    torch.testing.assert_close(found, each)
    for outputs in (found, each):
        outputs.square().sum().backward()
    for e, mlp in enumerate(mlps):
        torch.testing.assert_close(experts.fc1_weight.grad[e], mlp.fc1.weight.grad)
        torch.testing.assert_close(experts.fc2_weight.grad[e], mlp.fc2.weight.grad)
        torch.testing.assert_close(experts.fc2_bias.grad[e], mlp.fc2.bias.grad)


def test_weights_are_copies():
    mlps, experts = made()
    assert (experts.n_experts, experts.hidden) == (EXPERTS, HIDDEN)
    x = inputs(1, EXPERTS, 2, DIM)
    before = experts(x)
    for mlp in mlps:
        torch.nn.init.zeros_(mlp.fc1.weight)
    torch.testing.assert_close(experts(x), before, rtol=0, atol=0)


def test_hidden_activations_drop_out_in_training_only():
    x = inputs(1, EXPERTS, 50, DIM)
    (_, plain), (_, experts) = made(), made(drop=0.5)
    assert ((experts(x) == 0).double().mean() - 0.5).abs() < 0.1
    torch.testing.assert_close(experts.eval()(x), plain(x), rtol=0, atol=0)
