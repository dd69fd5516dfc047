import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.routes import drawn_routes, made_routes

FAMILIES = {"class_0": "truck", "class 1": "animal", "class 2": "truck", "class 3": "animal"}


def family_routes(seed=0):
    """Classes 0 and 2 use experts 0 to 2, classes 1 and 3 experts 3 to 5."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), 10)
    experts = rng.integers(0, 3, size=(40, 17)) + 3 * (labels % 2)[:, None]
    return made_routes(experts={0: experts}, labels=labels)


def test_every_ordered_pair_is_there_and_symmetric():
    table = measure.class_distance(drawn_routes(effect=0.5))
    assert len(table) == 2 * 4 * 4
    square = table[table["layer"] == 0].pivot(index="class_a", columns="class_b", values="js")
    np.testing.assert_allclose(square, square.T)


def test_a_class_is_nearest_to_itself_and_the_floor_says_so():
    table = measure.class_distance(drawn_routes(effect=0.8, layers=(0,)))
    own = table["class_a"] == table["class_b"]
    assert table.loc[own, "js"].max() < table.loc[~own, "js"].min()
    np.testing.assert_allclose(table.loc[own, "floor"], table.loc[own, "js"])


def test_without_a_class_effect_other_classes_are_at_the_floor():
    table = measure.class_distance(drawn_routes(each=60, layers=(0,)), splits=40)
    other = table[table["class_a"] != table["class_b"]]
    assert other["js"].mean() == pytest.approx(other["floor"].mean(), rel=0.25)


def test_families_stand_together():
    table = measure.class_distance(family_routes(), families=FAMILIES)
    order = table.drop_duplicates("order_a").sort_values("order_a")
    assert order["class_a"].tolist() == ["class 0", "class 2", "class 1", "class 3"]
    assert order["family_a"].tolist() == ["truck", "truck", "animal", "animal"]


def test_without_families_like_classes_stand_together():
    table = measure.class_distance(family_routes())
    order = table.drop_duplicates("class_a").sort_values("order_a")["class_a"].tolist()
    assert {*order[:2]} in ({"class 0", "class 2"}, {"class 1", "class 3"})


def test_separation_agrees_with_scikit_learn():
    table = measure.class_distance(drawn_routes(classes=8, effect=0.4), families=_pairs_of_eight())
    found = measure.family_separation(table, permutations=20)
    assert found["layer"].tolist() == [0, 1]
    for layer, auc in zip(found["layer"], found["auc"], strict=True):
        pairs = table[(table["layer"] == layer) & (table["class_a"] < table["class_b"])]
        expected = roc_auc_score(~pairs["same_family"].to_numpy(bool), pairs["js"])
        assert auc == pytest.approx(expected)


def _pairs_of_eight():
    return {f"class {c}": str(c // 2) for c in range(8)}


def test_separation_of_planted_families():
    table = measure.class_distance(family_routes(), families=FAMILIES)
    found = measure.family_separation(table).iloc[0]
    assert found["auc"] == 1
    assert found["ratio"] > 5
    assert (found["pairs_same"], found["pairs_other"]) == (2, 4)
    assert found["mean_same"] == pytest.approx(found["floor"], rel=0.5)


def test_bad_requests_are_told():
    with pytest.raises(MoeeError, match="none of class 3"):
        measure.class_distance(family_routes(), families={f"class {c}": "x" for c in range(3)})
    with pytest.raises(MoeeError, match="no column 'same_family'"):
        measure.family_separation(measure.class_distance(family_routes()))
    alone = measure.class_distance(family_routes(), families={f"class {c}": c for c in range(4)})
    with pytest.raises(MoeeError, match="0 of 6 pairs"):
        measure.family_separation(alone)


def test_classes_with_one_image_are_left_out_or_refused():
    routes = made_routes(experts={0: np.eye(5, 17, dtype=int)}, labels=[0, 0, 1, 1, 2])
    assert set(measure.class_distance(routes)["class_a"]) == {"class 0", "class 1"}
    with pytest.raises(MoeeError, match="one of class 2"):
        measure.class_distance(routes, classes=["class 2", "class 1"])
