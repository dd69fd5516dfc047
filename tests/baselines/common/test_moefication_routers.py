import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.moefication_routers import (
    EPOCHS,
    PATIENCE,
    CentreRouter,
    GroundTruthRouter,
    MlpRouter,
    captured,
    train_router,
)
from moee_analysis.errors import MoeeError
from moee_analysis.moe.layer import MoeMlp

DIM, HIDDEN = 6, 10
EXPERTS = [np.array([0, 2, 3, 9]), np.array([4, 5, 7]), np.array([1, 6, 8])]


def tokens(count=30):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_true_scores_are_sums_of_positive_activations():
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN).double()
    layer = MoeMlp(mlp, nn.Identity(), EXPERTS, np.ones(3))
    router = GroundTruthRouter(layer, k=2)
    hidden = mlp.act(mlp.fc1(tokens()))
    expected = torch.stack([hidden[:, ids].clamp(min=0).sum(1) for ids in EXPERTS], dim=1)
    torch.testing.assert_close(router.scores(tokens()).float(), expected.float())
    best = router.scores(tokens()).argsort(dim=1, descending=True)[:, :2]
    assert torch.equal(router(tokens().reshape(5, 6, DIM)), best)
    assert router.macs == DIM * HIDDEN
    assert router.n_experts == 3
    layer.fc1.weight.zero_()  # scores are those of the layer that is trained
    assert not router.scores(tokens()).sub(router.scores(-tokens())).any()


def test_the_centre_router_ranks_by_distance_and_the_mlp_router_is_one_without_biases():
    generator = torch.Generator().manual_seed(3)
    V = torch.randn(7, DIM, generator=generator, dtype=torch.float64)
    W = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    centre, mlp, inputs = CentreRouter(V, k=3), MlpRouter(V, W, k=3), tokens()
    directions = inputs / inputs.norm(dim=1, keepdim=True)
    nearest = torch.cdist(directions, V).topk(3, largest=False).indices
    assert torch.equal(centre(inputs), nearest)
    expected = torch.stack([W @ torch.tanh(V @ x) for x in directions])
    torch.testing.assert_close(mlp.scores(inputs), expected)
    assert torch.equal(mlp(inputs), expected.topk(3).indices)
    assert (centre.macs, mlp.macs) == (7 * DIM, 7 * DIM + 49)


# Training the small MLP

MANY, WIDE, K = 8, 12, 2
CENTRES = torch.randn(MANY, WIDE, generator=torch.Generator().manual_seed(5))


def problem(*, seed=0):
    """Tokens, scores that depend on their directions in a way unlike the centres, images."""
    inputs = torch.randn(5000, WIDE, generator=torch.Generator().manual_seed(seed))
    truth = torch.randn(MANY, WIDE, generator=torch.Generator().manual_seed(9))
    scores = torch.nn.functional.normalize(inputs, dim=1) @ truth.T
    return inputs, scores.clamp(min=0) ** 2, np.repeat(np.arange(200), 25)


def train(*, seed=0, scores=None):
    inputs, own, image = problem()
    scores = own if scores is None else scores
    return train_router(CENTRES, inputs, scores, image=image, k=K, seed=seed)


@pytest.fixture(scope="module")
def trained():
    return train()


def test_a_router_learns_what_its_centres_do_not_know(trained):
    inputs, scores, _ = problem(seed=1)
    best = captured(scores, scores.topk(K).indices)
    assert captured(scores, trained[0](inputs)) > 0.8 * best
    assert trained[1][0] < 0.4 * best


@pytest.mark.parametrize("known", [True, False])
def test_the_best_epoch_is_kept_and_training_ends_soon_after_it(known, trained):
    inputs, scores, image = problem()
    if not known:  # nothing to learn: epochs differ by chance
        scores = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(7))]
    found = trained if known else train(scores=scores)
    rows = np.isin(image, np.random.default_rng(0).permutation(np.unique(image))[:20])
    share = captured(scores[rows], found[0](inputs[rows]))
    assert share == pytest.approx(max(found[1]))
    best = int(np.argmax(found[1]))
    assert len(found[1]) == min(EPOCHS, best + PATIENCE) + 1
    assert known or best < EPOCHS - PATIENCE


def test_a_router_that_cannot_improve_stays_as_it_began():
    found = train(scores=torch.ones(5000, MANY))
    assert torch.equal(found[0].inward, CENTRES)
    assert torch.equal(found[0].outward, torch.eye(MANY))
    assert len(found[1]) < EPOCHS


def test_the_seed_decides_and_centres_are_left_alone_where_gradients_are_off_too(trained):
    before, other = CENTRES.clone(), train(seed=1)
    with torch.no_grad():
        again = train()
    assert torch.equal(CENTRES, before)
    assert torch.equal(trained[0].inward, again[0].inward)
    assert trained[1] == again[1]
    assert not torch.equal(trained[0].inward, other[0].inward)
    assert not any(held.requires_grad for held in trained[0].buffers())


def test_one_image_is_enough_and_one_token_is_not():
    inputs, scores, _ = problem()
    found = train_router(CENTRES, inputs[:40], scores[:40], image=np.zeros(40), k=K)
    assert max(found[1]) >= found[1][0]
    with pytest.raises(MoeeError, match="two calibration tokens"):
        train_router(CENTRES, inputs[:1], scores[:1], image=np.zeros(1), k=K)


def test_captured_is_the_mean_share_of_the_chosen():
    scores = torch.tensor([[1.0, 2, 1], [0, 3, 1], [0, 0, 0]])
    chosen = torch.tensor([[0, 1], [2, 0], [0, 1]])
    assert captured(scores, chosen) == pytest.approx((3 / 4 + 1 / 4 + 1) / 3)
