from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from moee_analysis.baselines.moefication import CentreRouter
from moee_analysis.errors import MoeeError
from moee_analysis.moe.routers import (
    ConstantRouter,
    CosineRouter,
    NearestRouter,
    RandomRouter,
    TokenKindRouter,
    nearest_in_metric,
)

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


# Whole inputs


@pytest.mark.parametrize(
    "router",
    [
        CosineRouter(CENTRES),
        NearestRouter(CENTRES, torch.arange(5.0)),
        NearestRouter(CENTRES[:, :3], torch.arange(5.0), CENTRES[:3]),
        RandomRouter(torch.ones(4), dim=12),
        ConstantRouter(2),
        CentreRouter(CENTRES, k=2),
    ],
    ids=lambda router: type(router).__name__,
)
@pytest.mark.parametrize("shape", [(10, 50, 12), (2, 5, 50, 12)])
def test_tokens_of_whole_inputs_are_routed_in_row_major_order(router, shape):
    assert torch.equal(router(TOKENS.reshape(shape)), router(TOKENS))


# The nearest centre in a metric


@pytest.mark.parametrize("rank", [3, 12, 20])
def test_the_linear_rule_finds_the_nearest_centre_in_the_metric(rank):
    root = torch.from_numpy(RNG.normal(size=(rank, 12)))
    centres = torch.from_numpy(RNG.normal(size=(7, rank))) * 4
    tokens = TOKENS.double()
    router = nearest_in_metric(centres, root)
    distances = ((tokens @ root.T)[:, None] - centres).square().sum(dim=2)
    chosen = router(tokens)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == distances.argmin(dim=1, keepdim=True).tolist()
    # 7 products of 12 values, or 3 of 12 and then 7 of 3
    assert (router.n_experts, router.macs) == (7, 57 if rank == 3 else 84)


@pytest.mark.parametrize("experts", [2, 4, 5, 40])
def test_tokens_are_projected_first_where_that_takes_fewer_macs(experts):
    root = torch.from_numpy(RNG.normal(size=(3, 12))).float()
    centres = torch.from_numpy(RNG.normal(size=(experts, 3))).float()
    router = nearest_in_metric(centres, root)
    assert router.macs == min(experts * 12, 3 * 12 + experts * 3)
    assert (router.projection is None) is (experts <= 4)


def test_a_projected_router_scores_projected_tokens():
    projection = torch.from_numpy(RNG.normal(size=(3, 12))).float()
    directions = torch.from_numpy(RNG.normal(size=(4, 3))).float()
    offsets = torch.tensor([0.0, 3.0, -1.0, 0.5])
    chosen = NearestRouter(directions, offsets, projection)(TOKENS[:50])
    expected = NearestRouter(directions @ projection, offsets)(TOKENS[:50])
    assert torch.equal(chosen, expected)


def test_a_nearest_router_takes_the_largest_score():
    directions = torch.from_numpy(RNG.normal(size=(4, 12))).float()
    offsets = torch.tensor([0.0, 3.0, -1.0, 0.5])
    chosen = NearestRouter(directions, offsets)(TOKENS[:50])
    scores = [[float(d @ x + o) for d, o in zip(directions, offsets, strict=True)] for x in TOKENS]
    assert chosen[:, 0].tolist() == [int(np.argmax(s)) for s in scores[:50]]


# Leading tokens and patches


@pytest.mark.parametrize("prefix", [(0,), (0, 1), (0, 1, 1), ()])
def test_leading_tokens_have_their_experts_and_patches_are_routed_among_the_others(prefix):
    x, inner = TOKENS.reshape(20, 25, 12), CosineRouter(CENTRES)
    router = TokenKindRouter(prefix, inner, tokens=25)
    first = len(set(prefix))
    expected = [
        prefix[place] if place < len(prefix) else first + int(inner(token[None]))
        for image in x
        for place, token in enumerate(image)
    ]
    chosen = router(x)
    assert chosen.shape == (500, 1)
    assert chosen.dtype == torch.int64
    assert chosen[:, 0].tolist() == expected
    assert router.n_experts == first + 5
    assert router.prefix_experts == first


def test_leading_tokens_cost_nothing():
    router = TokenKindRouter((0, 1), CosineRouter(CENTRES), tokens=10)
    assert router.macs == 5 * 12 * 8 / 10


def test_images_of_no_patches_and_no_images():
    router = TokenKindRouter((0, 1), CosineRouter(CENTRES), tokens=10)
    assert router(torch.zeros(3, 2, 12)).tolist() == [[0], [1]] * 3
    assert router(torch.zeros(0, 5, 12)).shape == (0, 1)


@pytest.mark.parametrize("shape", [(9, 12), (2, 3, 4, 12), (4, 1, 12)])
def test_an_input_whose_leading_tokens_are_unknown_is_refused(shape):
    with pytest.raises(MoeeError, match="2 or more"):
        TokenKindRouter((0, 1), CosineRouter(CENTRES), tokens=10)(torch.zeros(shape))


def test_patches_with_several_experts_each_are_refused():
    router = TokenKindRouter((0,), CentreRouter(CENTRES, k=2), tokens=5)
    with pytest.raises(MoeeError, match="2 experts"):
        router(torch.zeros(2, 5, 12))
