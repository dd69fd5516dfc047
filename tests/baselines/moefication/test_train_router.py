from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.baselines.moefication.routers import EPOCHS, PATIENCE, captured, train_router
from moee_analysis.errors import MoeeError

EXPERTS, DIM, K = 8, 12, 2


def problem(*, images=200, per_image=25, seed=0):
    """Tokens, scores that depend on their directions in a way unlike the centres, images."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images * per_image, DIM, generator=generator)
    truth = torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(9))
    scores = torch.nn.functional.normalize(inputs, dim=1) @ truth.T
    return inputs, scores.clamp(min=0) ** 2, np.repeat(np.arange(images), per_image)


def other_centres():
    return torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(5))


def train(*, seed=0, centres=None):
    inputs, scores, image = problem()
    centres = other_centres() if centres is None else centres
    return train_router(centres, inputs, scores, image=image, k=K, seed=seed)


def test_a_router_learns_what_its_centres_do_not_know():
    found = train()
    inputs, scores, _ = problem(seed=1)
    best = captured(scores, scores.topk(K).indices)
    assert captured(scores, found.router(inputs)) > 0.8 * best
    assert found.captured[0] < 0.4 * best


@pytest.mark.parametrize("known", [True, False])
def test_the_best_epoch_is_kept_and_training_ends_soon_after_it(known):
    inputs, scores, image = problem()
    if not known:  # nothing to learn: epochs differ by chance
        scores = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(7))]
    found = train_router(other_centres(), inputs, scores, image=image, k=K)
    judges = np.random.default_rng(0).permutation(np.unique(image))[:20]
    rows = torch.from_numpy(np.flatnonzero(np.isin(image, judges)))
    share = captured(scores[rows], found.router(inputs[rows]))
    assert share == pytest.approx(max(found.captured))
    best = int(np.argmax(found.captured))
    assert len(found.captured) == min(EPOCHS, best + PATIENCE) + 1
    assert known or best < EPOCHS - PATIENCE


def test_a_router_that_cannot_improve_stays_as_it_began():
    inputs, _, image = problem()
    centres = other_centres()
    even = torch.ones(len(inputs), EXPERTS)
    found = train_router(centres, inputs, even, image=image, k=K)
    assert torch.equal(found.router.inward, centres)
    assert torch.equal(found.router.outward, torch.eye(EXPERTS))
    assert len(found.captured) < EPOCHS


def test_the_seed_decides_and_centres_are_left_alone():
    centres = other_centres()
    before = centres.clone()
    one, again, other = (train(seed=s, centres=centres) for s in (0, 0, 1))
    assert torch.equal(centres, before)
    assert torch.equal(one.router.inward, again.router.inward)
    assert one.captured == again.captured
    assert not torch.equal(one.router.inward, other.router.inward)
    assert not any(held.requires_grad for held in one.router.buffers())


def test_one_image_is_enough_and_one_token_is_not():
    inputs, scores, _ = problem(images=1, per_image=40)
    found = train_router(other_centres(), inputs, scores, image=np.zeros(40), k=K)
    assert max(found.captured) >= found.captured[0]
    with pytest.raises(MoeeError, match="two calibration tokens"):
        train_router(other_centres(), inputs[:1], scores[:1], image=np.zeros(1), k=K)


def test_it_trains_where_gradients_are_off():
    expected = train().captured
    with torch.no_grad():
        assert train().captured == expected


def test_captured_is_the_mean_share_of_the_chosen():
    scores = torch.tensor([[1.0, 2, 1], [0, 3, 1], [0, 0, 0]])
    chosen = torch.tensor([[0, 1], [2, 0], [0, 1]])
    assert captured(scores, chosen) == pytest.approx((3 / 4 + 1 / 4 + 1) / 3)
