from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis.baselines.jetpack.activation_profile import BATCH, profile
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit
from tests.helpers.widened import convnext, lively_ones

IMAGES = toy_images(BATCH + 5)  # more than a batch


def seen(model, name):
    """What a module gets, of all tokens of all images."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2))
    )
    with torch.inference_mode():
        model(torch.cat(list(IMAGES.batches(model))))
    hook.remove()
    return found[0].double()


VIT = {
    "blocks.1.mlp": "blocks.1.mlp.fc2",
    "blocks.2.mlp.fc1": "blocks.2.mlp.fc1",
    "blocks.0.attn": "blocks.0.attn.proj",
}
CONVNEXT = {
    "stages.1.blocks.1.mlp": "stages.1.blocks.1.mlp.fc2",
    "stages.0.blocks.0.mlp.fc1": "stages.0.blocks.0.mlp.fc1",
}


@pytest.mark.parametrize(
    ("make", "places"), [(toy_vit, VIT), (lambda: lively_ones(convnext(16)), CONVNEXT)]
)
def test_sums_are_those_of_all_tokens_at_once(make, places):
    model = make().train()
    found = profile(model, IMAGES, together=True)
    assert (hooks_of(model), model.training) == (0, True)
    model.eval()
    for place, module in places.items():
        tokens = seen(model, module)
        active = (tokens > 0).double()
        expected = {
            "L1": tokens.abs().mean(0),
            "L2": tokens.square().mean(0).sqrt(),
            "act_patrn": active.mean(0),
        }
        for metric, values in expected.items():
            np.testing.assert_allclose(found.worth(place, metric), values, rtol=1e-4)
        if "mlp" in place:
            counts = found.together(place)
            assert np.abs(counts - (active.T @ active).numpy()).max() <= 2  # rounding about 0
            np.testing.assert_array_equal(counts, counts.T)


def test_a_store_finds_the_sums_again(tmp_path):
    model, few = toy_vit(), IMAGES.take(range(4))
    first = profile(model, few, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = profile(model, few, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(again.tensors[name], t) for name, t in first.tensors.items())
    profile(model, few, together=True, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
