import numpy as np
import pytest
import torch

from moee_analysis.baselines.jetpack.activation_profile import BATCH, profile
from moee_analysis.models.capture import capture
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit
from tests.helpers.widened import convnext, lively_ones

IMAGES = toy_images(BATCH + 5)  # more than a batch


PLACES = {  # and the modules that get what is counted there
    toy_vit: {
        "blocks.1.mlp": "blocks.1.mlp.fc2",
        "blocks.2.mlp.fc1": "blocks.2.mlp.fc1",
        "blocks.0.attn": "blocks.0.attn.proj",
    },
    lambda: lively_ones(convnext(16)): {
        "stages.1.blocks.1.mlp": "stages.1.blocks.1.mlp.fc2",
        "stages.0.blocks.0.mlp.fc1": "stages.0.blocks.0.mlp.fc1",
    },
}


@pytest.mark.parametrize(("make", "places"), PLACES.items())
def test_sums_are_those_of_all_tokens_at_once_and_found_again(make, places, tmp_path):
    model = make().train()
    found = profile(model, IMAGES, together=True, store=tmp_path)
    assert (hooks_of(model), model.training) == (0, True)
    again = profile(model, IMAGES, together=True, store=tmp_path)
    assert all(torch.equal(again.tensors[name], t) for name, t in found.tensors.items())
    assert len(list(tmp_path.iterdir())) == 1
    profile(model, IMAGES, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with capture(model.eval(), places.values(), "inputs") as seen, torch.inference_mode():
        model(torch.cat(list(IMAGES.batches(model))))
    for place, module in places.items():
        tokens = seen[module].flatten(0, -2).double()
        active = (tokens > 0).double()
        for metric, expected in (
            ("L1", tokens.abs().mean(0)), ("L2", tokens.square().mean(0).sqrt()),
            ("act_patrn", active.mean(0)),
        ):  # fmt: skip
            np.testing.assert_allclose(found.worth(place, metric), expected, rtol=1e-4)
        if "mlp" in place:
            counts = found.together(place)
            assert np.abs(counts - (active.T @ active).numpy()).max() <= 2  # rounding about 0
            np.testing.assert_array_equal(counts, counts.T)
