from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.models import toy_vit

CLASSES = 5


def distances(js: np.ndarray) -> pd.DataFrame:
    a, b = (i.ravel() for i in np.indices(js.shape))
    return pd.DataFrame(
        {"system": "MoEE", "layer": 0, "class_index_a": a, "class_index_b": b, "js": js.ravel()}
    )


def classifier_distance(model: nn.Module) -> np.ndarray:
    rows = model.get_classifier().weight.detach().double().numpy()[:CLASSES]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 1 - rows @ rows.T


@pytest.fixture
def model():
    made = toy_vit()
    with torch.no_grad():
        made.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(3))
    return made


def test_is_the_rank_correlation_over_pairs(model):
    rng = np.random.default_rng(0)
    js = rng.random((CLASSES, CLASSES))
    js = (js + js.T) / 2
    pairs = np.triu_indices(CLASSES, 1)
    expected = spearmanr(js[pairs], classifier_distance(model)[pairs]).statistic
    row = measure.class_relatedness(distances(js), model, permutations=20).iloc[0]
    assert row["spearman"] == pytest.approx(expected)


def test_equal_distances_are_found_and_beat_permuted_classes(model):
    table = distances(classifier_distance(model))
    row = measure.class_relatedness(table, model, permutations=200).iloc[0]
    assert row["spearman"] == pytest.approx(1)
    assert row["p"] < 0.1
    assert row["null_high"] < 1


def test_too_few_classes_are_refused(model):
    with pytest.raises(MoeeError, match="four classes"):
        measure.class_relatedness(distances(np.ones((3, 3))), model)


def test_a_model_without_a_classifier_is_refused(model):
    model.head = nn.Identity()
    with pytest.raises(MoeeError, match="linear classifier"):
        measure.class_relatedness(distances(np.eye(CLASSES)), model)
