from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moee_analysis.baselines.jetpack.sphero_router import ExpertDropout, SpheroRouter

COMBINES = ("softmax", "entmax15")


def tokens(*, images=2, count=9, dim=16):
    return torch.randn(images, count, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("combine", COMBINES)
def test_slots_are_made_of_all_of_the_tokens_and_tokens_of_all_of_the_slots(combine):
    dispatch, combined = SpheroRouter(16, 5, slots=3, combine=combine)(tokens())
    assert dispatch.shape == combined.shape == (2, 9, 15)
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 15))
    torch.testing.assert_close(combined.sum(dim=2), torch.ones(2, 9))
    assert (dispatch > 0).all()
    assert (combined >= 0).all()


@pytest.mark.parametrize("combine", COMBINES)
def test_low_precision_products_still_give_shares(combine):
    router = SpheroRouter(16, 60, slots=3, combine=combine)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dispatch, combined = router(tokens())
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 180), atol=1e-4, rtol=0)
    torch.testing.assert_close(combined.sum(dim=2), torch.ones(2, 9), atol=1e-4, rtol=0)


def test_logits_are_cosines_of_normed_queries_each_for_itself():
    router = SpheroRouter(16, 3, slots=2).requires_grad_(requires_grad=False)
    router.query_norm.weight.uniform_(0.5, 2)
    found, x = router.logits(tokens()), tokens()
    for image, token, expert, slot in ((0, 0, 0, 0), (1, 4, 1, 1), (1, 8, 2, 0)):
        query = router.query_norm(router.queries[expert, slot])
        cosine = functional.cosine_similarity(x[image, token], query, dim=0)
        torch.testing.assert_close(found[image, token, 2 * expert + slot], cosine)


def test_keys_that_are_not_normalised_make_long_tokens_loud():
    loud, plain = (SpheroRouter(16, 3, normalize_key=normed) for normed in (False, True))
    x = tokens()
    torch.testing.assert_close(loud.logits(2 * x), 2 * loud.logits(x))
    torch.testing.assert_close(plain.logits(2 * x), plain.logits(x))


def centred(logits):
    """What softmaxes over tokens and over slots both leave of the logits."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred - centred.mean(dim=2, keepdim=True)


def test_both_temperatures_work_for_themselves():
    router = SpheroRouter(16, 4, temperature=0.5)
    x = tokens()
    logits = router.logits(x)
    router.dispatch_temperature.data.fill_(0.1)
    dispatch, combine = router.eval()(x)
    torch.testing.assert_close(dispatch, (10 * logits).softmax(dim=1))
    torch.testing.assert_close(combine, (2 * logits).softmax(dim=2))


@pytest.mark.parametrize(("experts", "slots"), [(5, 2), (40, 1)])
def test_queries_start_orthogonal(experts, slots):
    queries = SpheroRouter(16, experts, slots=slots).queries.flatten(1)
    few = queries if experts <= queries.shape[1] else queries.T
    torch.testing.assert_close(few @ few.T, torch.eye(len(few)), atol=1e-5, rtol=0)


def test_the_seed_decides_the_queries():
    first, again, other = (SpheroRouter(16, 4, seed=seed).queries for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_is_for_training_alone_and_the_same_for_both():
    router, x = SpheroRouter(16, 4, noise=0.5), tokens()
    assert all(map(torch.equal, router.eval()(x), router(x)))
    first, second = router.train()(x), router(x)
    assert not torch.equal(first.dispatch, second.dispatch)
    torch.testing.assert_close(centred(first.dispatch.log()), centred(first.combine.log()))
    quiet = SpheroRouter(16, 4, noise=0.0).train()
    assert all(map(torch.equal, quiet(x), quiet(x)))


def test_noise_is_one_over_the_experts_unless_given():
    assert SpheroRouter(16, 8).noise == 1 / 8


@pytest.mark.parametrize("combine", COMBINES)
def test_gradients_reach_queries_norm_and_temperatures(combine):
    router = SpheroRouter(16, 4, combine=combine)
    dispatch, combined = router(tokens())
    weights = torch.randn(4, generator=torch.Generator().manual_seed(2))
    ((dispatch * weights).square().sum() + (combined * weights).square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())


# Dropout of experts


def made():
    return torch.ones(200, 10, 3, 4)


def test_whole_experts_drop_out_and_the_others_make_up_for_them():
    out = ExpertDropout(0.25).train()(made())
    of_expert = out.flatten(2)
    assert ((of_expert == 0).all(2) | torch.isclose(of_expert, torch.tensor(4 / 3)).all(2)).all()
    dropped = (of_expert == 0).all(2)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.05)
    assert not dropped.all(1).any()  # experts by themselves, not all of an image


def test_all_experts_of_an_image_drop_out_together():
    out = ExpertDropout(0.25, of_images=True).train()(made()).flatten(1)
    dropped = (out == 0).all(1)
    assert ((out == 0).any(1) == dropped).all()
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.1)


def test_nothing_drops_out_in_evaluation_or_at_rate_0():
    assert torch.equal(ExpertDropout(0.9).eval()(made()), made())
    assert torch.equal(ExpertDropout(0.0).train()(made()), made())
