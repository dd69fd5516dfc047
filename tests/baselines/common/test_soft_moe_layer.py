import itertools

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn.functional import cosine_similarity

from moee_analysis.baselines.common.exchange import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import (
    ExpertDropout,
    Mixing,
    SlotMlp,
    SoftRouter,
    SpheroRouter,
)
from moee_analysis.moe.layer import ExpertLayer

DIM, TOKENS, IMAGES = 6, 7, 3
SIZES = (10, 10, 4)  # hidden neurons of three experts, in two groups


def tokens(*shape):
    shape = shape or (IMAGES, TOKENS, DIM)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def soft_router(*, slots=2, **settings):
    router = SoftRouter(DIM, len(SIZES), slots=slots, seed=3, **settings).double().eval()
    nn.init.constant_(router.scale, 4.0)
    return router


def made(*, slots=2):
    """MLPs of random weights, and the layer of slots that has them as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(DIM, hidden).double() for hidden in SIZES]
    groups = [ExpertMlps(mlps[:2], mlps[0].act), ExpertMlps(mlps[2:], mlps[0].act)]
    return mlps, SlotMlp(soft_router(slots=slots), groups, slots=slots).eval()


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
    x = tokens(2, 3, 4, DIM)  # on a grid; images do not mix
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

    mlps, layer = made()
    layer.drop = DropFirst()
    x = tokens()
    dispatch, combine = layer.router(x)
    expected = layer(x)
    combine[:, :, :2] = 0
    torch.testing.assert_close(expected, one_by_one(mlps, 2, Mixing(dispatch, combine), x))


@pytest.mark.parametrize("count", [1, 5, 50])
def test_the_mixing_is_that_of_the_definition(count):
    """Softmaxes over tokens, and over all slots."""
    soft, x = soft_router(), tokens(IMAGES, count, DIM)
    embeddings, rows = soft.embeddings.detach().numpy(), x.numpy()
    rows = rows / np.sqrt((rows**2).sum(-1, keepdims=True) + 1e-6)
    embeddings = embeddings / np.sqrt((embeddings**2).sum(0, keepdims=True) + 1e-6)
    raised = np.exp(soft.scale.item() * np.einsum("bnd,des->bnes", rows, embeddings))
    for found, axes in zip(soft(x), (1, (2, 3)), strict=True):
        expected = raised / raised.sum(axis=axes, keepdims=True)
        torch.testing.assert_close(found, torch.from_numpy(expected).flatten(2))


def test_noise_is_added_in_training_only():
    soft, x = soft_router(noise=0.5), tokens(2000, 1, DIM).expand(-1, 2, -1)
    torch.testing.assert_close(soft(x), soft_router()(x), rtol=0, atol=0)
    logs = soft.train()(x).dispatch.log()
    spread = (logs[:, 0] - logs[:, 1]).var(dim=0)  # of the difference of two tokens' noise
    assert spread.mean().item() == pytest.approx(2 * 0.5**2, abs=0.03)


# SpheroMoE

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("low", [False, True])
def test_slots_are_mixtures_of_all_tokens_and_tokens_of_all_slots(low):
    router = SpheroRouter(16, 60, slots=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        dispatch, combined = router(X)
    assert dispatch.shape == combined.shape == (2, 9, 180)
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 180), atol=1e-4, rtol=0)
    torch.testing.assert_close(combined.sum(dim=2), torch.ones(2, 9), atol=1e-4, rtol=0)
    assert (dispatch > 0).all()
    assert (combined > 0).all()


def test_logits_are_cosines_of_normed_queries_each_for_itself_by_two_temperatures():
    router = SpheroRouter(16, 3, slots=2, temperature=0.5).requires_grad_(requires_grad=False)
    router.query_norm.weight.uniform_(0.5, 2)
    queries, found = router.query_norm(router.queries).flatten(0, 1), router.logits(X)
    torch.testing.assert_close(found, cosine_similarity(X[:, :, None], queries, dim=-1))
    torch.testing.assert_close(router.logits(2 * X), found)
    router.dispatch_temperature.fill_(0.1)
    dispatch, combine = router.eval()(X)
    torch.testing.assert_close(dispatch, (10 * found).softmax(dim=1))
    torch.testing.assert_close(combine, (2 * found).softmax(dim=2))


@pytest.mark.parametrize(("experts", "slots"), [(5, 2), (40, 1)])
def test_queries_start_orthogonal_by_the_seed(experts, slots):
    routers = (SpheroRouter(16, experts, slots=slots, seed=seed) for seed in (0, 0, 1))
    first, again, other = (router.queries.flatten(1) for router in routers)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    few = first if experts <= first.shape[1] else first.T
    torch.testing.assert_close(few @ few.T, torch.eye(len(few)), atol=1e-5, rtol=0)


def centred(weights):
    """What softmaxes over tokens and over slots both leave of the logits."""
    logits = weights.log() - weights.log().mean(dim=1, keepdim=True)
    return logits - logits.mean(dim=2, keepdim=True)


def test_sphero_noise_is_for_training_alone_and_the_same_for_both():
    router = SpheroRouter(16, 4, noise=0.5)
    assert all(map(torch.equal, router.eval()(X), router(X)))
    first, second = router.train()(X), router(X)
    assert not torch.equal(first.dispatch, second.dispatch)
    torch.testing.assert_close(centred(first.dispatch), centred(first.combine))
    quiet = SpheroRouter(16, 4, noise=0.0).train()
    assert all(map(torch.equal, quiet(X), quiet(X)))
    assert SpheroRouter(16, 8).noise == 1 / 8


def drop(rate):
    return ExpertDropout(rate).train()(torch.ones(200, 10, 3, 4)).flatten(2)


def test_whole_experts_drop_out_in_training_and_the_others_make_up_for_them():
    outputs = drop(0.25)
    dropped = (outputs == 0).all(2)
    assert (dropped | torch.isclose(outputs, torch.tensor(4 / 3)).all(2)).all()
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.05)
    assert not dropped.all(1).any()  # experts by themselves, not all of an image
    assert (drop(0.0) == 1).all()
    assert (ExpertDropout(0.9).eval()(torch.ones(2, 10, 3, 4)) == 1).all()
