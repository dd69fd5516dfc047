from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.record.recording import Recording
from moee_analysis.extraction.record.tokens import RecordedLayer, TokenPlan, capture_mlps
from moee_analysis.models.loading import find_mlps
from tests.helpers.images import toy_images
from tests.helpers.layers import PLANTED
from tests.helpers.models import pixels_of, toy_swin, toy_vit

# One forward pass


def test_inputs_and_hidden_activations_are_what_a_hand_computes():
    model, images = toy_vit(), pixels_of(toy_vit())
    with capture_mlps(model, find_mlps(model)) as captured:
        model(images)
    x = model._pos_embed(model.patch_embed(images))
    for block, seen in zip(model.blocks, captured.values(), strict=True):
        x = x + block.attn(block.norm1(x))
        inputs = block.norm2(x)
        hidden = torch.nn.functional.gelu(inputs @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        torch.testing.assert_close(seen["inputs"], inputs)
        torch.testing.assert_close(seen["hidden"], hidden)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_a_grid_of_tokens_is_flattened_row_by_row():
    model, grids = toy_swin(), {}
    site = find_mlps(model)[1]
    site.module(model).register_forward_pre_hook(lambda _, args: grids.update(seen=args[0]))
    with capture_mlps(model, [site]) as captured:
        model(pixels_of(model))
    assert captured[site.name]["inputs"].shape == (4, 16, 32)
    torch.testing.assert_close(captured[site.name]["inputs"].flatten(), grids["seen"].flatten())


# Which tokens


def test_prefix_tokens_are_kept_and_patches_drawn_without_repetition_by_the_seed():
    plan, again, other = (TokenPlan(per_image=5, prefix=2, seed=seed) for seed in (3, 3, 4))
    rows = [plan.positions(image, 17).tolist() for image in range(20)]
    for positions in rows:
        assert positions[:2] == [0, 1]
        assert positions == sorted(set(positions))
        assert len(positions) == 7
        assert max(positions) < 17
    assert again.positions(7, 17).tolist() == rows[7] != rows[8]
    assert other.positions(7, 17).tolist() != rows[7]


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 65])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_weights_stand_for_all_tokens_of_the_image(tokens, prefix):
    plan, everything = (TokenPlan(per_image=count, prefix=prefix) for count in (6, None))
    assert plan.weights(tokens).sum() == pytest.approx(tokens)
    assert len(plan.weights(tokens)) == len(plan.positions(0, tokens))
    assert everything.positions(3, tokens).tolist() == list(range(tokens))
    assert everything.weights(tokens).tolist() == [1] * tokens


def test_layers_of_patches_alone_have_no_prefix_and_a_plan_of_their_own():
    plan = TokenPlan(per_image=5, prefix=1, patches_alone=frozenset({16}))
    assert plan.weights(16).tolist() == [16 / 5] * 5
    assert plan.weights(17).tolist() == [1] + [16 / 5] * 5
    assert plan.facts != TokenPlan(per_image=5, prefix=1).facts


# A layer with hidden activations in any case


def recorded(kinds):
    model = toy_vit()
    sites = tuple(find_mlps(model))
    samples = Recording(model, toy_images(5), sites, TokenPlan(None, 1), kinds).in_memory()
    return [RecordedLayer(site, site.module(model), samples[site.name]) for site in sites]


def test_hidden_activations_that_were_not_recorded_are_computed_from_the_inputs():
    written, bare = recorded(("inputs", "hidden")), recorded(("inputs",))
    for known, computed, block in zip(written, bare, toy_vit().blocks, strict=True):
        assert torch.equal(computed.mlp.fc1.weight, block.mlp.fc1.weight)
        assert isinstance(known.sample.hidden, np.ndarray)
        assert computed.sample.hidden is None
        for rows in (slice(3, 9), np.array([0, 20, 84])):
            found = computed.hidden(rows)
            assert found.dtype == torch.float32
            x = torch.from_numpy(np.array(computed.sample.inputs[rows])).float()
            torch.testing.assert_close(found, block.mlp.act(block.mlp.fc1(x)))
            torch.testing.assert_close(known.hidden(rows), found, rtol=0.01, atol=0.02)
        part = replace(computed, sample=computed.sample.part(slice(7, 20)))
        own, whole = part.hidden(np.array([0, 5])), computed.hidden(np.array([7, 12]))
        torch.testing.assert_close(own, whole)


@pytest.mark.parametrize("size", [1, 7, 89, 90, 1000])
def test_chunks_are_all_rows_one_after_the_other(size):
    chunks = list(PLANTED.chunks(size=size))
    assert np.concatenate(chunks).tolist() == list(range(90))
    assert max(map(len, chunks)) <= size
    assert [rows.tolist() for rows in PLANTED.chunks(np.array([5, 8, 9]), size=2)] == [[5, 8], [9]]
