import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.models import toy_vit
from tests.helpers.routes import drawn_routes, made_routes

FAMILIES = {"class_0": "truck", "class 1": "animal", "class 2": "truck", "class 3": "animal"}
CLASSES = 5


def family_routes():
    """Classes 0 and 2 use experts 0 to 2, classes 1 and 3 experts 3 to 5."""
    labels = np.repeat(np.arange(4), 10)
    experts = np.random.default_rng(0).integers(0, 3, size=(40, 17)) + 3 * (labels % 2)[:, None]
    return made_routes(experts={0: experts}, labels=labels)


def test_pairs_are_symmetric_and_a_class_is_nearest_to_itself():
    table = measure.class_distance(drawn_routes(effect=0.8))
    assert len(table) == 2 * 4 * 4
    square = table[table["layer"] == 0].pivot(index="class_a", columns="class_b", values="js")
    np.testing.assert_allclose(square, square.T)
    own = table["class_a"] == table["class_b"]
    assert table.loc[own, "js"].max() < table.loc[~own, "js"].min()
    np.testing.assert_allclose(table.loc[own, "floor"], table.loc[own, "js"])


def test_without_a_class_effect_other_classes_are_at_the_floor():
    table = measure.class_distance(drawn_routes(each=60, layers=(0,)), splits=40)
    other = table[table["class_a"] != table["class_b"]]
    assert other["js"].mean() == pytest.approx(other["floor"].mean(), rel=0.25)


def test_families_or_else_like_classes_stand_together():
    table = measure.class_distance(family_routes(), families=FAMILIES)
    order = table.drop_duplicates("order_a").sort_values("order_a")
    assert order["class_a"].tolist() == ["class 0", "class 2", "class 1", "class 3"]
    assert order["family_a"].tolist() == ["truck", "truck", "animal", "animal"]
    assert (table["same_family"] == (table["family_a"] == table["family_b"])).all()
    table = measure.class_distance(family_routes())
    order = table.drop_duplicates("class_a").sort_values("order_a")["class_a"].tolist()
    assert {*order[:2]} in ({"class 0", "class 2"}, {"class 1", "class 3"})


def test_classes_without_a_family_or_with_one_image_are_left_out_or_refused():
    with pytest.raises(MoeeError, match="none of class 3"):
        measure.class_distance(family_routes(), families={f"class {c}": "x" for c in range(3)})
    routes = made_routes(experts={0: np.eye(5, 17, dtype=int)}, labels=[0, 0, 1, 1, 2])
    assert set(measure.class_distance(routes)["class_a"]) == {"class 0", "class 1"}
    with pytest.raises(MoeeError, match="one of class 2"):
        measure.class_distance(routes, classes=["class 2", "class 1"])


def relatedness(js, model, permutations=20):
    a, b = np.indices(js.shape).reshape(2, -1)
    columns = {"class_index_a": a, "class_index_b": b, "js": js.ravel()}
    table = pd.DataFrame({"system": "MoEE", "layer": 0} | columns)
    return measure.class_relatedness(table, model, permutations=permutations).iloc[0]


@pytest.fixture
def model():
    made = toy_vit()
    with torch.no_grad():
        made.get_classifier().weight.normal_(generator=torch.Generator().manual_seed(3))
    return made


@pytest.fixture
def distances(model):
    rows = model.get_classifier().weight[:CLASSES].double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 1 - rows @ rows.T


def test_relatedness_is_the_rank_correlation_over_pairs(model, distances):
    js, pairs = np.random.default_rng(0).random((CLASSES, CLASSES)), np.triu_indices(CLASSES, 1)
    js = (js + js.T) / 2
    expected = spearmanr(js[pairs], distances[pairs]).statistic
    assert relatedness(js, model)["spearman"] == pytest.approx(expected)


def test_equal_distances_are_found_and_beat_permuted_classes(model, distances):
    row = relatedness(distances, model, permutations=200)
    assert row["spearman"] == pytest.approx(1)
    assert row["p"] < 0.1
    assert row["null_high"] < 1


def test_few_classes_and_models_without_a_classifier_are_refused(model):
    with pytest.raises(MoeeError, match="four classes"):
        relatedness(np.ones((3, 3)), model)
    model.head = nn.Identity()
    with pytest.raises(MoeeError, match="linear classifier"):
        relatedness(np.eye(CLASSES), model)
