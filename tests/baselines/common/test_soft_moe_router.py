from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.baselines.common.soft_moe_router import SoftRouter

DIM, EXPERTS, SLOTS = 6, 3, 2


def router(**settings):
    made = SoftRouter(DIM, EXPERTS, slots=SLOTS, seed=1, **settings).double().eval()
    torch.nn.init.constant_(made.scale, 3.0)
    return made


def tokens(images=2, count=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, count, DIM, generator=generator, dtype=torch.float64)


def in_numpy(made, x):
    """Dispatch and combine by their definitions: softmaxes over tokens, and over all slots."""
    embeddings = made.embeddings.detach().numpy()
    x = x.numpy() / np.sqrt((x.numpy() ** 2).sum(-1, keepdims=True) + 1e-6)
    embeddings = embeddings / np.sqrt((embeddings**2).sum(0, keepdims=True) + 1e-6)
    scale = made.scale.item()
    raised = np.exp(scale * np.einsum("bnd,des->bnes", x, embeddings))
    dispatch = raised / raised.sum(axis=1, keepdims=True)
    combine = raised / raised.sum(axis=(2, 3), keepdims=True)
    return dispatch.reshape(*x.shape[:2], -1), combine.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("count", [1, 5, 50])
def test_the_mixing_is_that_of_the_definition(count):
    made, x = router(), tokens(count=count)
    for found, expected in zip(made(x), in_numpy(made, x), strict=True):
        torch.testing.assert_close(found, torch.from_numpy(expected))


def test_noise_is_added_in_training_only():
    made, x = router(noise=0.5), tokens()
    torch.testing.assert_close(made(x), router()(x), rtol=0, atol=0)
    made.train()
    logs = torch.stack([made(x).dispatch.log() for _ in range(2000)])
    spread = (logs[:, :, 0] - logs[:, :, 1]).var(dim=0)  # of the difference of two tokens' noise
    assert spread.mean().item() == pytest.approx(2 * 0.5**2, abs=0.03)


def test_a_large_scale_sends_each_token_to_its_nearest_slot():
    made, x = router(), tokens()
    torch.nn.init.constant_(made.scale, 1e4)
    combine, logits = made(x).combine, made.logits(x)
    torch.testing.assert_close(combine.max(dim=2).values, torch.ones(2, 5).double())
    assert torch.equal(combine.argmax(dim=2), logits.argmax(dim=2))


def test_a_scale_of_nothing_mixes_evenly():
    made, x = router(), tokens()
    torch.nn.init.zeros_(made.scale)
    torch.testing.assert_close(made(x).dispatch, torch.full((2, 5, 6), 1 / 5).double())
    torch.testing.assert_close(made(x).combine, torch.full((2, 5, 6), 1 / 6).double())


def test_lengths_of_tokens_and_embeddings_do_not_matter():
    made, x = router(), tokens()
    before = made(x)
    made.embeddings.data *= 7
    torch.testing.assert_close(made(3 * x), before, rtol=1e-4, atol=1e-5)


def test_scale_and_embeddings_learn():
    made, x = router(), tokens()
    (made(x).combine * torch.arange(6)).sum().backward()
    assert made.scale.grad.abs() > 0
    assert (made.embeddings.grad != 0).all()
