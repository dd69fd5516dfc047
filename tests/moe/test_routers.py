from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from moee_analysis.baselines.common.moefication_routers import CentreRouter
from moee_analysis.errors import MoeeError
from moee_analysis.moe.routers import (
    ConstantRouter,
    CosineRouter,
    NearestRouter,
    RandomRouter,
    TokenKindRouter,
    describe_router,
    nearest_in_metric,
    rebuild_router,
)

RNG = np.random.default_rng(0)
TOKENS = torch.from_numpy(RNG.normal(size=(500, 12))).float()
CENTRES = torch.from_numpy(RNG.normal(size=(5, 12)) * [[1], [9], [0.1], [3], [100]]).float()
PROJECTED = NearestRouter(CENTRES[:, :3], torch.arange(5.0), CENTRES[:3])
SAVED = [
    CosineRouter(CENTRES), NearestRouter(CENTRES, torch.arange(5.0)), PROJECTED, ConstantRouter(2),
    TokenKindRouter((0, 1, 1), PROJECTED, tokens=50),
]  # fmt: skip


def test_a_token_goes_to_the_centre_of_largest_cosine_similarity():
    router = CosineRouter(CENTRES)
    chosen = router(TOKENS)
    wanted = cosine_similarity(TOKENS.numpy(), CENTRES.numpy()).argmax(axis=1)
    assert chosen.shape == (500, 1)
    assert chosen.dtype == torch.int64
    assert chosen[:, 0].tolist() == wanted.tolist()
    assert torch.equal(router(7 * TOKENS), chosen)
    assert (router.n_experts, router.macs) == (5, 5 * 12)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.9, 0.0, 0.1], [1.2, 0.6, 0.2]])
def test_a_random_router_follows_the_shares_not_the_content_and_repeats_itself(shares):
    router = RandomRouter(torch.tensor(shares), dim=12)
    tokens = torch.from_numpy(RNG.normal(size=(20_000, 12))).float()
    chosen = router(tokens)
    assert chosen.shape == (20_000, 1)
    found = torch.bincount(chosen[:, 0], minlength=3) / len(tokens)
    wanted = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(found, wanted, atol=0.015, rtol=0)
    assert (found > 0).tolist() == [share > 0 for share in shares]
    assert (router.n_experts, router.macs) == (3, 0)
    again = RandomRouter(torch.tensor(shares), dim=12)
    order = torch.from_numpy(RNG.permutation(20_000))
    assert torch.equal(again(tokens[order]), chosen[order])
    assert not torch.equal(RandomRouter(torch.tensor(shares), dim=12, seed=5)(tokens), chosen)
    alike = torch.ones(12) + 0.01 * TOKENS
    found = torch.bincount(RandomRouter(torch.ones(2), dim=12)(alike)[:, 0]) / 500
    assert 0.4 < found[0] < 0.6


def test_a_constant_router_sends_everything_to_one_expert_that_is_part_of_its_state():
    router, other = ConstantRouter(3), ConstantRouter()
    assert router(TOKENS).tolist() == [[3]] * 500
    assert (router.n_experts, router.macs) == (4, 0)
    other.load_state_dict(router.state_dict())
    assert other(TOKENS[:2]).tolist() == [[3], [3]]


@pytest.mark.parametrize("router", SAVED, ids=lambda router: type(router).__name__)
def test_a_router_is_rebuilt_from_its_description_and_tensors(router):
    described = describe_router(router)
    again = rebuild_router(described, router.state_dict())
    assert describe_router(again) == described
    assert torch.equal(again(TOKENS.reshape(10, 50, 12)), router(TOKENS.reshape(10, 50, 12)))
    assert (again.n_experts, again.macs) == (router.n_experts, router.macs)


@pytest.mark.parametrize(
    "router",
    [*SAVED[:4], RandomRouter(torch.ones(4), dim=12), CentreRouter(CENTRES, k=2)],
    ids=lambda router: type(router).__name__,
)
@pytest.mark.parametrize("shape", [(10, 50, 12), (2, 5, 50, 12)])
def test_tokens_of_whole_inputs_are_routed_in_row_major_order(router, shape):
    assert torch.equal(router(TOKENS.reshape(shape)), router(TOKENS))


# The nearest centre in a metric


@pytest.mark.parametrize("rank", [3, 12, 20])
@pytest.mark.parametrize("experts", [2, 4, 5, 7, 40])
def test_the_linear_rule_finds_the_nearest_centre_in_the_metric_with_fewest_macs(rank, experts):
    root = torch.from_numpy(RNG.normal(size=(rank, 12)))
    centres = torch.from_numpy(RNG.normal(size=(experts, rank))) * 4
    tokens = TOKENS.double()
    router = nearest_in_metric(centres, root)
    distances = ((tokens @ root.T)[:, None] - centres).square().sum(dim=2)
    chosen = router(tokens)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == distances.argmin(dim=1, keepdim=True).tolist()
    assert router.n_experts == experts
    assert router.macs == min(experts * 12, rank * 12 + experts * rank)
    assert (router.projection is None) is (experts * 12 <= rank * 12 + experts * rank)


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
    assert (router.n_experts, router.prefix_experts) == (first + 5, first)
    assert router.macs == 5 * 12 * (25 - len(prefix)) / 25
    leading = router(x[:3, : len(prefix)])
    assert leading.tolist() == [[expert] for expert in prefix] * 3
    assert router(torch.zeros(0, 5, 12)).shape == (0, 1)


OF_TWO = TokenKindRouter((0, 1), CosineRouter(CENTRES), tokens=10)
RANDOM = TokenKindRouter((0,), RandomRouter(torch.ones(2), dim=12), tokens=5)


@pytest.mark.parametrize(("call", "words"), [
    *((partial(OF_TWO, torch.zeros(shape)), "2 or more")
      for shape in ((9, 12), (2, 3, 4, 12), (4, 1, 12))),
    (partial(describe_router, RANDOM), r"cosine, constant, nearest, token_kinds.*RandomRouter"),
])  # fmt: skip
def test_what_a_router_cannot_do_is_refused(call, words):
    with pytest.raises(MoeeError, match=words):
        call()
