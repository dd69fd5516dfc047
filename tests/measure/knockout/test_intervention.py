"""Tokens that are knocked out get a constant; everything else stays as it was."""

import pytest
import torch

from moee_analysis.measure.knockout.intervention import (
    alone,
    at_random,
    knocked_out,
    mean_outputs,
    removed,
)
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, seen_by, toy_kinds, toy_moe, toy_swin, toy_vit

IMAGES = toy_images(10)
CHOSEN = torch.randint(0, 4, (6, 17), generator=torch.Generator().manual_seed(0))


def seen_at(model, layer):
    """What a layer's MLP gets and gives for the images."""
    return seen_by(moe_layers(model)[layer], model, IMAGES)[0]


@pytest.mark.parametrize("make", [toy_moe, toy_kinds])
def test_tokens_of_the_expert_get_the_constant_and_others_what_they_had(make):
    model = make(toy_vit())
    constant = torch.tensor([[7.0], [9.0]]).expand(2, 32)
    inputs, before = seen_at(model, 1)
    chosen = moe_layers(model)[1].router(inputs).reshape(10, 17)
    expert = int(chosen[:, 1:].mode().values[0])
    with knocked_out(model, 1, removed(expert), constant):
        after = seen_at(model, 1)[1]
    lost, kinds = chosen == expert, torch.arange(17).clamp(max=1)
    assert lost.any()
    assert torch.equal(after[~lost], before[~lost])
    assert torch.equal(after[lost], constant[kinds].expand(10, -1, -1)[lost])


def test_windows_of_an_image_belong_together():
    model = toy_moe(toy_swin())
    with knocked_out(model, 0, at_random(alone(-1)), torch.full((1, 16), 5.0)):
        assert (seen_at(model, 0)[1] == 5).all()


def test_an_expert_that_no_token_uses_and_the_only_expert_change_nothing():
    model = toy_moe(toy_vit(), n_experts=1)
    x, constant = next(IMAGES.batches(model)), torch.full((2, 32), 100.0)
    intact = model(x)
    for rule in (removed(3), alone(0), at_random(alone(0)), at_random(removed(3))):
        with knocked_out(model, 1, rule, constant):
            assert torch.equal(model(x), intact)
    with knocked_out(model, 1, removed(0), constant):
        assert not torch.allclose(model(x), intact)
    with pytest.raises(ZeroDivisionError), knocked_out(model, 0, removed(0), constant):
        _ = 1 / 0
    assert hooks_of(model) == 0


def test_the_control_takes_as_many_tokens_of_every_image_whatever_the_batches():
    for rule in (removed(2), alone(1)):
        mask, drawn = rule(CHOSEN), at_random(rule, leading=1, seed=3)(CHOSEN)
        assert torch.equal(drawn.sum(dim=1), mask.sum(dim=1))
        assert torch.equal(drawn[:, 0], mask[:, 0])
        assert not torch.equal(drawn, mask)
    whole = at_random(removed(2), seed=[3, 1])(CHOSEN)
    rule = at_random(removed(2), seed=[3, 1])
    assert torch.equal(torch.cat([rule(CHOSEN[:4]), rule(CHOSEN[4:])]), whole)
    assert not torch.equal(at_random(removed(2), seed=[3, 2])(CHOSEN), whole)
    one = torch.tensor([[0, 1, 0, 0, 0]]).expand(4000, -1)
    often = at_random(removed(1), leading=1)(one).float().mean(dim=0)
    torch.testing.assert_close(often, torch.tensor([0, 0.25, 0.25, 0.25, 0.25]), atol=0.03, rtol=0)


@pytest.mark.parametrize("batch_size", [3, None])
def test_mean_outputs_are_those_of_leading_tokens_and_of_patches(batch_size):
    model, swin = toy_kinds(toy_vit()), toy_moe(toy_swin())
    found = mean_outputs(model, IMAGES, batch_size=batch_size)
    assert list(found) == [0, 1, 2]
    outputs = seen_at(model, 1)[1]
    expected = torch.stack([outputs[:, 0].mean(dim=0), outputs[:, 1:].mean(dim=(0, 1))])
    torch.testing.assert_close(found[1], expected)
    patches = mean_outputs(swin, IMAGES, layers=[1], batch_size=batch_size)[1]  # have one mean
    torch.testing.assert_close(patches, seen_at(swin, 1)[1].reshape(1, -1, 32).mean(dim=1))
