from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from moee_analysis.baselines.common.balance_losses import (
    gshard_loss,
    importance_loss,
    load_loss,
    routed_by,
)
from moee_analysis.baselines.sparse_upcycling import SparseUpcyclingConfig, convert
from moee_analysis.errors import MoeeError
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit

IMAGES, TOKENS, EXPERTS = 3, 20, 4


def logits(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(IMAGES, TOKENS, EXPERTS)))


def gates_of(image):
    raised = np.exp(image)
    return raised / raised.sum(axis=1, keepdims=True)


def test_importance_is_the_cv_of_summed_gates():
    sums = [gates_of(image).sum(axis=0) for image in logits().numpy()]
    expected = np.mean([(s.std() / s.mean()) ** 2 for s in sums])
    assert importance_loss(logits()).item() == pytest.approx(expected)


def test_load_is_the_cv_of_expected_numbers_of_tokens():
    clean, noise, k = logits(), 0.5, 2
    noisy = clean + noise * logits(1)
    found = []
    for image in range(IMAGES):
        chance = np.zeros((TOKENS, EXPERTS))
        for token in range(TOKENS):
            least = sorted(noisy[image, token].tolist())[-k]
            for expert in range(EXPERTS):
                chance[token, expert] = 1 - norm.cdf((least - clean[image, token, expert]) / noise)
        mean = chance.mean(axis=0)
        found.append((mean.std() / mean.mean()) ** 2)
    assert load_loss(clean, noisy, k=k, noise=noise).item() == pytest.approx(np.mean(found))


def test_gshard_is_the_product_of_first_choices_and_mean_gates():
    found = []
    for image in logits().numpy():
        gates = gates_of(image)
        first = np.bincount(gates.argmax(axis=1), minlength=EXPERTS) / TOKENS
        found.append(EXPERTS**2 * np.mean(first * gates.mean(axis=0)))
    assert gshard_loss(logits()).item() == pytest.approx(np.mean(found))


def test_even_experts_cost_nothing():
    even = torch.eye(EXPERTS).repeat(5, 1)[None]
    assert importance_loss(even).item() == pytest.approx(0, abs=1e-12)
    assert load_loss(even, even, k=1, noise=0.1).item() == pytest.approx(0, abs=1e-12)
    assert gshard_loss(even).item() == pytest.approx(1)


def test_one_expert_for_all_costs_most():
    one = torch.zeros(1, TOKENS, EXPERTS)
    one[..., 0] = 50
    assert importance_loss(one).item() == pytest.approx(EXPERTS - 1)
    assert load_loss(one, one + 1e-9, k=1, noise=0.1).item() == pytest.approx(EXPERTS - 1)
    assert gshard_loss(one).item() == pytest.approx(EXPERTS)


def test_load_needs_noise():
    with pytest.raises(MoeeError, match="noise above 0"):
        load_loss(logits(), logits(), k=1, noise=0.0)


def test_training_on_the_losses_balances_a_models_router():
    config = SparseUpcyclingConfig(experts=EXPERTS, router="top_k", k=1, noise=1.0)
    model = convert(toy_vit(), toy_images(1), config).requires_grad_().train()
    router, hooks = model.blocks[1].mlp.router, hooks_of(model)
    torch.nn.init.normal_(router.gate.weight)
    optimiser = torch.optim.SGD(router.parameters(), lr=0.03)
    x, values = next(toy_images(6).batches(toy_vit())), []
    with routed_by(model) as routed:
        for _ in range(60):
            model(x)
            last = routed["blocks.1.mlp"]
            losses = torch.stack([
                importance_loss(last.logits),
                load_loss(last.logits, last.noisy, k=1, noise=1 / EXPERTS),
                gshard_loss(last.noisy),
            ])  # fmt: skip
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
            values.append(losses.detach())
    assert len(routed) == 1
    assert hooks_of(model) == hooks
    assert (values[-1] < 0.7 * values[0]).all()
