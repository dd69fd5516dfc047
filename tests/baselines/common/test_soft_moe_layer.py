from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import Mixing, SlotMlp, SoftRouter
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


def test_tokens_on_a_grid_are_those_of_an_image_and_images_do_not_mix():
    _, layer = made()
    x = tokens(2, 3, 4, DIM)
    torch.testing.assert_close(layer(x), layer(x.flatten(1, 2)).reshape(x.shape))
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]))


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


def test_gradients_reach_experts_router_and_tokens():
    _, layer = made()
    x = tokens().requires_grad_()
    layer(x).square().sum().backward()
    assert (x.grad != 0).all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# The router


def router(**settings):
    soft = SoftRouter(DIM, 3, slots=2, seed=1, **settings).double().eval()
    nn.init.constant_(soft.scale, 3.0)
    return soft


def in_numpy(soft, x):
    """Dispatch and combine by their definitions: softmaxes over tokens, and over all slots."""
    embeddings = soft.embeddings.detach().numpy()
    x = x.numpy() / np.sqrt((x.numpy() ** 2).sum(-1, keepdims=True) + 1e-6)
    embeddings = embeddings / np.sqrt((embeddings**2).sum(0, keepdims=True) + 1e-6)
    scale = soft.scale.item()
    raised = np.exp(scale * np.einsum("bnd,des->bnes", x, embeddings))
    dispatch = raised / raised.sum(axis=1, keepdims=True)
    combine = raised / raised.sum(axis=(2, 3), keepdims=True)
    return dispatch.reshape(*x.shape[:2], -1), combine.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_the_mixing_is_that_of_the_definition(count):
    soft, x = router(), tokens(IMAGES, count, DIM)
    for found, expected in zip(soft(x), in_numpy(soft, x), strict=True):
        torch.testing.assert_close(found, torch.from_numpy(expected))


def test_noise_is_added_in_training_only():
    soft, x = router(noise=0.5), tokens()
    torch.testing.assert_close(soft(x), router()(x), rtol=0, atol=0)
    soft.train()
    logs = torch.stack([soft(x).dispatch.log() for _ in range(2000)])
    spread = (logs[:, :, 0] - logs[:, :, 1]).var(dim=0)  # of the difference of two tokens' noise
    assert spread.mean().item() == pytest.approx(2 * 0.5**2, abs=0.03)


def test_the_scale_goes_from_even_mixing_to_the_nearest_slot():
    soft, x = router(), tokens()
    nn.init.constant_(soft.scale, 1e4)
    combine, logits = soft(x).combine, soft.logits(x)
    torch.testing.assert_close(combine.max(dim=2).values, torch.ones(IMAGES, TOKENS).double())
    assert torch.equal(combine.argmax(dim=2), logits.argmax(dim=2))
    nn.init.zeros_(soft.scale)
    for mixing, parts in zip(soft(x), (TOKENS, 6), strict=True):
        torch.testing.assert_close(mixing, torch.full((IMAGES, TOKENS, 6), 1 / parts).double())


def test_lengths_of_tokens_and_embeddings_do_not_matter():
    soft, x = router(), tokens()
    before = soft(x)
    soft.embeddings.data *= 7
    torch.testing.assert_close(soft(3 * x), before, rtol=1e-4, atol=1e-5)


def test_scale_and_embeddings_learn():
    soft, x = router(), tokens()
    (soft(x).combine * torch.arange(6)).sum().backward()
    assert soft.scale.grad.abs() > 0
    assert (soft.embeddings.grad != 0).all()
