from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from moee_analysis.routers import ConstantRouter, CosineRouter, RandomRouter

RNG = np.random.default_rng(0)
TOKENS = torch.from_numpy(RNG.normal(size=(500, 12))).float()
CENTRES = torch.from_numpy(RNG.normal(size=(5, 12)) * [[1], [9], [0.1], [3], [100]]).float()


def test_a_token_goes_to_the_centre_of_largest_cosine_similarity():
    chosen = CosineRouter(CENTRES)(TOKENS)
    wanted = cosine_similarity(TOKENS.numpy(), CENTRES.numpy()).argmax(axis=1)
    assert chosen.shape == (500, 1)
    assert chosen.dtype == torch.int64
    assert chosen[:, 0].tolist() == wanted.tolist()


def test_the_length_of_a_token_does_not_matter():
    router = CosineRouter(CENTRES)
    assert torch.equal(router(7 * TOKENS), router(TOKENS))


def test_a_cosine_router_costs_a_product_with_every_centre():
    assert CosineRouter(CENTRES).macs == 5 * 12
    assert CosineRouter(CENTRES).n_experts == 5


def test_a_random_router_repeats_itself_for_the_same_tokens():
    shares = torch.tensor([0.5, 0.3, 0.2])
    once, again = (RandomRouter(shares, dim=12, seed=4) for _ in range(2))
    order = torch.from_numpy(RNG.permutation(500))
    assert torch.equal(once(TOKENS)[order], again(TOKENS[order]))
    assert not torch.equal(once(TOKENS), RandomRouter(shares, dim=12, seed=5)(TOKENS))


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.9, 0.0, 0.1], [1.2, 0.6, 0.2]])
def test_a_random_router_follows_the_shares(shares):
    router = RandomRouter(torch.tensor(shares), dim=12)
    tokens = torch.from_numpy(RNG.normal(size=(20_000, 12))).float()
    chosen = router(tokens)
    assert chosen.shape == (20_000, 1)
    found = torch.bincount(chosen[:, 0], minlength=3) / len(tokens)
    wanted = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(found, wanted, atol=0.015, rtol=0)
    assert (found > 0).tolist() == [share > 0 for share in shares]
    assert router.n_experts == 3


def test_a_random_router_does_not_follow_the_content():
    centre = torch.ones(12)
    alike = centre + 0.01 * TOKENS
    found = torch.bincount(RandomRouter(torch.ones(2), dim=12)(alike)[:, 0]) / 500
    assert 0.4 < found[0] < 0.6


def test_a_constant_router_sends_everything_to_one_expert_for_free():
    router = ConstantRouter(3)
    assert router(TOKENS).tolist() == [[3]] * 500
    assert router.macs == 0
    assert router.n_experts == 4


def test_which_expert_is_constant_is_part_of_the_state():
    other = ConstantRouter()
    other.load_state_dict(ConstantRouter(3).state_dict())
    assert other(TOKENS[:2]).tolist() == [[3], [3]]
