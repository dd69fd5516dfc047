from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.extraction.record.hooks import TokenPlan, recording
from moee_analysis.models.loading import find_mlps
from tests.helpers.makers import hooks_of, pixels_of, sample_of
from tests.helpers.toys import toy_swin, toy_vit


def act_of_w1(mlp, x):
    return torch.nn.functional.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias)


# Recording one forward pass


def test_inputs_and_hidden_activations_are_what_a_hand_computes():
    model, images = toy_vit(), pixels_of(toy_vit())
    with recording(model, find_mlps(model)) as captured:
        model(images)
    x = model._pos_embed(model.patch_embed(images))
    for block, seen in zip(model.blocks, captured.values(), strict=True):
        x = x + block.attn(block.norm1(x))
        inputs = block.norm2(x)
        hidden = act_of_w1(block.mlp, inputs)
        torch.testing.assert_close(seen.inputs, inputs)
        torch.testing.assert_close(seen.hidden, hidden)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_a_grid_of_tokens_is_flattened_row_by_row():
    model = toy_swin()
    grids = {}
    site = find_mlps(model)[1]
    model.get_submodule(site.name).register_forward_pre_hook(
        lambda _, args: grids.update(seen=args[0])
    )
    with recording(model, [site]) as captured:
        model(pixels_of(model))
    assert captured[site.name].inputs.shape == (4, 16, 32)
    torch.testing.assert_close(captured[site.name].inputs.flatten(), grids["seen"].flatten())


def test_hooks_come_off_also_after_an_error():
    model = toy_vit()
    with pytest.raises(ValueError, match="unpack"), recording(model, find_mlps(model)):
        model(torch.zeros(7))
    assert hooks_of(model) == 0


def test_hooks_come_off_when_a_site_does_not_exist():
    model = toy_vit()
    with pytest.raises(AttributeError), recording(model, find_mlps(toy_vit(depth=4))):
        pass
    assert hooks_of(model) == 0


# Which tokens


def test_all_prefix_tokens_are_kept_and_patches_are_drawn_without_repetition():
    plan = TokenPlan(per_image=5, prefix=2, seed=3)
    for image in range(20):
        positions = plan.positions(image, 17)
        assert positions[:2].tolist() == [0, 1]
        assert len(set(positions)) == 7
        assert positions.tolist() == sorted(positions)
        assert positions.max() < 17


def test_the_same_seed_draws_the_same_tokens():
    first, again = TokenPlan(5, 1, seed=3), TokenPlan(5, 1, seed=3)
    other = TokenPlan(5, 1, seed=4)
    rows = [tuple(plan.positions(7, 65)) for plan in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]
    assert tuple(first.positions(8, 65)) != rows[0]


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 65])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_weights_stand_for_all_tokens_of_the_image(tokens, prefix):
    plan = TokenPlan(per_image=6, prefix=prefix)
    weights = plan.weights(tokens)
    assert weights.sum() == pytest.approx(tokens)
    assert len(weights) == len(plan.positions(0, tokens))


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_no_number_of_tokens_means_all_of_them_each_for_itself(tokens, prefix):
    plan = TokenPlan(per_image=None, prefix=prefix)
    assert plan.positions(3, tokens).tolist() == list(range(tokens))
    assert plan.weights(tokens).tolist() == [1] * tokens


def test_layers_of_patches_alone_have_no_prefix_and_a_plan_of_their_own():
    plan = TokenPlan(per_image=5, prefix=1, patches_alone=frozenset({16}))
    assert plan.weights(16).tolist() == [16 / 5] * 5
    assert plan.weights(17).tolist() == [1] + [16 / 5] * 5
    assert plan.facts != TokenPlan(per_image=5, prefix=1).facts


# A part of a sample


def whole_sample():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, 20, 5)).astype("f2")
    image, position = np.divmod(np.arange(20, dtype=np.int32), 4)
    values = {"inputs": rng.normal(size=(20, 5)).astype("f2"), "weight": rng.random(20)}
    sample = sample_of(
        rng.normal(size=(20, 8)), gradients=gradients, image=image, position=position, **values
    )
    sample.norms[:] = rng.random(size=(3, 20))
    return sample


def test_a_part_is_some_rows_of_everything_and_knows_where_it_starts():
    sample = whole_sample()
    part = sample.part(slice(6, 13))
    assert (len(part), part.start) == (7, 6)
    for name in ("inputs", "hidden", "image", "position", "weight"):
        np.testing.assert_array_equal(getattr(part, name), getattr(sample, name)[6:13])
        assert np.shares_memory(getattr(part, name), getattr(sample, name))
    np.testing.assert_array_equal(part.gradients(slice(None)), sample.gradients(slice(6, 13)))
    assert len(sample) == 20


def test_a_part_of_a_part_starts_where_it_does_in_the_whole():
    sample = whole_sample()
    part = sample.part(slice(6, 13)).part(slice(2, 4))
    assert part.start == 8
    np.testing.assert_array_equal(part.inputs, sample.inputs[8:10])


def test_what_a_sample_does_not_have_its_parts_do_not_have():
    part = sample_of(inputs=np.zeros((6, 4), "f2")).part(slice(2, 6))
    assert part.hidden is part.directions is part.norms is None
