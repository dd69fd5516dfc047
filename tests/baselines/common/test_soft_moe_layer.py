from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import Mixing, SlotMlp
from moee_analysis.baselines.common.soft_moe_router import SoftRouter
from moee_analysis.moe.expert_layer import ExpertLayer

DIM, TOKENS, IMAGES = 6, 7, 3
SIZES = (10, 10, 4)  # hidden neurons of three experts, in two groups


def made(*, slots=2, drop=None):
    """MLPs of random weights, and the layer of slots that has them as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(DIM, hidden).double() for hidden in SIZES]
    groups = [ExpertMlps(mlps[:2], mlps[0].act), ExpertMlps(mlps[2:], mlps[0].act)]
    router = SoftRouter(DIM, len(SIZES), slots=slots, seed=3).double()
    nn.init.constant_(router.scale, 4.0)
    return mlps, SlotMlp(router, groups, slots=slots, drop=drop).eval()


def tokens(*shape):
    shape = shape or (IMAGES, TOKENS, DIM)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def one_by_one(mlps, slots, mixing, x):
    """Every slot of every expert from every token, then every token from every slot."""
    outputs = torch.zeros_like(x)
    for image in range(len(x)):
        made_of_slots = []
        for slot in range(len(mlps) * slots):
            weights = mixing.dispatch[image, :, slot]
            mixed = sum(w * token for w, token in zip(weights, x[image], strict=True))
            made_of_slots.append(mlps[slot // slots](mixed))
        for token in range(x.shape[1]):
            for slot, output in enumerate(made_of_slots):
                outputs[image, token] += mixing.combine[image, token, slot] * output
    return outputs


@pytest.mark.parametrize("slots", [1, 2])
def test_the_layer_equals_loops_over_tokens_slots_and_experts(slots):
    mlps, layer = made(slots=slots)
    x = tokens()
    torch.testing.assert_close(layer(x), one_by_one(mlps, slots, layer.router(x), x))


def test_tokens_on_a_grid_are_the_tokens_of_an_image():
    _, layer = made()
    x = tokens(2, 3, 4, DIM)
    torch.testing.assert_close(layer(x), layer(x.flatten(1, 2)).reshape(x.shape))


def test_images_do_not_mix():
    _, layer = made()
    x = tokens()
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize("kind", ["own", "random", "constant"])
def test_slots_are_mixtures_of_tokens_and_tokens_of_slots(kind):
    _, layer = made()
    routers = {
        "own": layer.router,
        "random": layer.random_router(5),
        "constant": layer.constant_router(),
    }
    mixing = routers[kind](tokens())
    assert mixing.dispatch.shape == mixing.combine.shape == (IMAGES, TOKENS, 6)
    assert (mixing.dispatch >= 0).all()
    assert (mixing.combine >= 0).all()
    torch.testing.assert_close(mixing.dispatch.sum(1), torch.ones(IMAGES, 6).double())
    torch.testing.assert_close(mixing.combine.sum(2), torch.ones(IMAGES, TOKENS).double())


def test_usage_is_the_mass_of_an_experts_slots_and_sums_to_the_tokens():
    _, layer = made()
    mixing = layer.router(tokens())
    usage = layer.usage(mixing)
    assert isinstance(layer, ExpertLayer)
    assert usage.dtype == torch.float64
    assert usage.sum().item() == pytest.approx(IMAGES * TOKENS)
    assert usage[1].item() == pytest.approx(mixing.combine[:, :, 2:4].sum().item())


def test_usage_of_the_random_router_is_that_of_the_own_one():
    _, layer = made()
    x = tokens()
    own, other = layer.router(x), layer.random_router(0)(x)
    torch.testing.assert_close(layer.usage(other), layer.usage(own))
    assert not torch.equal(other.combine, own.combine)
    same = layer.random_router(0)(x)
    torch.testing.assert_close(other, same, rtol=0, atol=0)


def test_the_constant_router_makes_the_mean_of_all():
    mlps, layer = made()
    x = tokens()
    layer.router = layer.constant_router()
    mean = torch.stack([mlp(x.mean(1)) for mlp in mlps]).mean(0)
    torch.testing.assert_close(layer(x), mean[:, None].expand_as(x))


def test_what_drops_experts_sees_the_outputs_of_each():
    class DropFirst(nn.Module):
        def forward(self, outputs):
            return torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, 1:]], dim=1)

    mlps, layer = made(drop=DropFirst())
    x = tokens()
    mixing = layer.router(x)
    combine = mixing.combine.clone()
    combine[:, :, :2] = 0
    expected = one_by_one(mlps, 2, Mixing(mixing.dispatch, combine), x)
    torch.testing.assert_close(layer(x), expected)


def test_state_is_restored():
    _, layer = made()
    _, other = made()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(layer.state_dict())
    x = tokens()
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)


def test_gradients_reach_experts_router_and_tokens():
    _, layer = made()
    x = tokens().requires_grad_()
    layer(x).square().sum().backward()
    assert (x.grad != 0).all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
