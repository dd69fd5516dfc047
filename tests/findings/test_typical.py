from __future__ import annotations

import numpy as np
import pandas as pd

from moee_analysis import findings

TABLE = pd.DataFrame(
    {
        "layer": [2, 2, 2, 4],
        "expert": [0, 0, 1, 3],
        "cosine": [0.9, 0.5, 0.8, 0.7],
        "share": [0.25, 0.25, 0.01, 0.1],
        "images": [20, 20, 3, 9],
    }
)


def test_the_busiest_and_the_idlest_expert_and_the_most_alike_patches():
    told = findings.top_patches(TABLE)
    assert told.startswith("Of 3 experts expert 0 of layer 2 takes 25.0 % of the patches")
    assert "expert 1 of layer 2 takes 1.0 %" in told
    assert "most alike for expert 1 of layer 2: all have a cosine of 0.80 or more" in told


def test_one_expert_is_not_compared():
    told = findings.top_patches(TABLE[:2])
    assert told.startswith("Expert 0 of layer 2 takes 25.0 % of the patches, in 20 images.")
    assert "0.50 or more" in told


def test_no_patch_is_said():
    assert findings.top_patches(TABLE[:0]).startswith("No patch")


def test_how_many_experts_an_image_meets():
    experts = {
        0: np.zeros((2, 2, 2), int),
        5: np.array([[[0, 1], [2, 3]], [[0, 0], [0, 1]]]),
    }
    pictures = [None, None]
    told = findings.image_layers(pictures, experts)
    assert "one of 2 images, on average, meet 1 experts in layer 0 and 3 experts in layer 5" in told
    assert "meet 1 experts in layer 0 and 4 experts in layer 5" in findings.image_layers(
        pictures, experts, 0
    )
    assert findings.image_layers(pictures, {}) == "There is no layer of patches to show."
