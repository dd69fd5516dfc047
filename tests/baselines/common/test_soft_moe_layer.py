import itertools

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.replace_mlps import ExpertMlps
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
    for image, slot in itertools.product(range(len(x)), range(len(mlps) * slots)):
        weights = mixing.dispatch[image, :, slot]
        mixed = sum(w * token for w, token in zip(weights, x[image], strict=True))
        output = mlps[slot // slots](mixed)
        for token in range(x.shape[1]):
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


def test_usage_is_the_mass_of_an_experts_slots_and_random_routing_leaves_it_as_it_is():
    _, layer = made()
    assert isinstance(layer, ExpertLayer)
    own, other, same = (r(tokens()) for r in (layer.router, *map(layer.random_router, (0, 0))))
    usage = layer.usage(own)
    assert usage.dtype == torch.float64
    assert usage.sum().item() == pytest.approx(IMAGES * TOKENS)
    assert usage[1].item() == pytest.approx(own.combine[:, :, 2:4].sum().item())
    torch.testing.assert_close(layer.usage(other), usage)
    assert not torch.equal(other.combine, own.combine)
    torch.testing.assert_close(other, same, rtol=0, atol=0)
    for sums in (other.dispatch.sum(1), other.combine.sum(2)):
        torch.testing.assert_close(sums, torch.ones_like(sums))


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
    soft, x = router(noise=0.5), tokens(2000, 1, DIM).expand(-1, 2, -1)
    torch.testing.assert_close(soft(x), router()(x), rtol=0, atol=0)
    logs = soft.train()(x).dispatch.log()
    spread = (logs[:, 0] - logs[:, 1]).var(dim=0)  # of the difference of two tokens' noise
    assert spread.mean().item() == pytest.approx(2 * 0.5**2, abs=0.03)
