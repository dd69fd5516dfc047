import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr
from torch.nn.functional import normalize

from moee_analysis import measure
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_vit
from tests.helpers.routes import drawn_routes, made_routes

FEW = {"permutations": 9, "resamples": 9}


def class_means(routes, layer):
    shares = routes.counts[layer] / 17
    return np.stack([shares[routes.labels == c].mean(axis=0) for c in range(4)])


def specificity(routes, resamples=2):
    """The rows of all classes."""
    table = measure.specificity(routes, permutations=99, resamples=resamples)
    return table[table["class_name"] == "all"]


def test_shares_of_a_class_are_means_over_its_images_and_shown_in_the_given_order():
    experts = {2: np.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 2]])}
    table = measure.class_routing(made_routes(experts=experts, labels=[3, 3, 5]))
    three = table[table["class_index"] == 3]
    assert three["share"].tolist() == [0.75, 0.25, 0]
    assert three["images"].tolist() == [2, 2, 2]
    # both classes weigh the same, however many images they have
    np.testing.assert_allclose(three["share_all"], [0.375, 0.5, 0.125])
    table = measure.class_routing(drawn_routes(), classes=["Class_3", 1], layers=[1])
    assert table["class_name"].unique().tolist() == ["class 3", "class 1"]
    assert table["layer"].unique().tolist() == [1]


def test_specificity_is_the_divergence_from_the_mean_over_classes():
    routes = drawn_routes(effect=0.5)
    table = measure.specificity(routes, **FEW)
    means = class_means(routes, 1)
    expected = [jensenshannon(m, means.mean(axis=0), base=2) ** 2 for m in means]
    found = table[table["layer"] == 1]
    np.testing.assert_allclose(found["js"], [*expected, np.mean(expected)])
    assert found["class_name"].tolist() == [*(f"class {c}" for c in range(4)), "all"]
    assert found["images"].tolist() == [20, 20, 20, 20, 80]
    few = measure.specificity(routes, classes=["class 2"], **FEW)  # no number changes
    both = table[table["class_name"].isin(["class 2", "all"])].reset_index(drop=True)
    assert few.equals(both)


def test_a_class_effect_is_found_where_there_is_one():
    ps = [specificity(drawn_routes(layers=(0,), seed=seed))["p"].item() for seed in range(12)]
    assert min(ps) > 0.01
    assert 0.2 < np.mean(ps) < 0.8
    # all tokens of an image share an expert: a null over tokens would reject, ours must not
    experts = np.random.default_rng(0).integers(0, 4, size=(60, 1)).repeat(17, axis=1)
    together = specificity(made_routes(experts={0: experts}, labels=np.arange(60) % 3))
    assert together["p"].item() > 0.05
    planted = specificity(drawn_routes(effect=0.6), resamples=99)
    assert (planted["p"] == 0.01).all()
    assert (planted["excess"] > 3 * planted["null_mean"]).all()
    assert (planted["low"] > 0).all()


def test_correction_brings_the_value_nearer_to_that_of_many_images():
    truth, found = (  # the same classes: the seed draws their distributions first
        measure.class_information(
            drawn_routes(each=each, effect=0.3, layers=(0,)), permutations=1, resamples=99
        ).iloc[0]
        for each in (1000, 12)
    )
    assert found["information"] > truth["information"]
    error = abs(found["corrected"] - truth["information"])
    assert error < found["information"] - truth["information"]


def test_a_single_image_has_no_interval():
    experts = {0: np.array([[0, 1], [0, 0], [1, 1], [0, 1]])}
    routes = made_routes(experts=experts, labels=[0, 1, 1, 1])
    table = measure.specificity(routes, **FEW).set_index("class_name")
    assert table.loc[["class 0", "class 1"], "low"].isna().tolist() == [True, False]


def test_information_agrees_with_its_definition():
    routes = drawn_routes(effect=0.5, layers=(0,))
    found = measure.class_information(routes, **FEW)
    joint = class_means(routes, 0) / 4
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    mutual = entropy(joint.ravel(), product.ravel())
    assert found["information"].item() == pytest.approx(mutual / entropy(joint.sum(0)))
    assert found["classes"].item() == 4
    one = made_routes(experts={0: np.zeros((6, 17), dtype=int)}, labels=[0, 0, 1, 1, 2, 2])
    alone = measure.class_information(one, **FEW)
    assert (alone["information"].item(), alone["p"].item()) == (0, 1)


def test_sources_are_systems_side_by_side_or_a_model_with_images():
    systems = [drawn_routes(), drawn_routes(system="random centres", seed=1)]
    table = measure.specificity(systems, **FEW)
    assert table["system"].unique().tolist() == ["MoEE", "random centres"]
    model, images = toy_moe(toy_vit()), toy_images(12)
    expected = measure.class_routing(measure.routes(model, images))
    assert measure.class_routing(model, images).equals(expected)


def test_pairs_are_symmetric_and_classes_as_near_as_themselves_where_they_do_not_matter():
    table = measure.class_distance(drawn_routes(effect=0.8))
    assert len(table) == 2 * 4 * 4
    square = table[table["layer"] == 0].pivot(index="class_a", columns="class_b", values="js")
    np.testing.assert_allclose(square, square.T)
    own = table["class_a"] == table["class_b"]
    assert table.loc[own, "js"].max() < table.loc[~own, "js"].min()
    np.testing.assert_allclose(table.loc[own, "floor"], table.loc[own, "js"])
    table = measure.class_distance(drawn_routes(each=60, layers=(0,)), splits=40)
    other = table[table["class_a"] != table["class_b"]]
    assert other["js"].mean() == pytest.approx(other["floor"].mean(), rel=0.25)


def test_families_or_else_like_classes_stand_together():
    """Classes 0 and 2 use experts 0 to 2, classes 1 and 3 experts 3 to 5."""
    labels = np.repeat(np.arange(4), 10)
    experts = np.random.default_rng(0).integers(0, 3, size=(40, 17)) + 3 * (labels % 2)[:, None]
    routes = made_routes(experts={0: experts}, labels=labels)
    families = {"class_0": "truck", "class 1": "animal", "class 2": "truck", "class 3": "animal"}
    table = measure.class_distance(routes, families=families)
    order = table.drop_duplicates("order_a").sort_values("order_a")
    assert order["class_a"].tolist() == ["class 0", "class 2", "class 1", "class 3"]
    assert order["family_a"].tolist() == ["truck", "truck", "animal", "animal"]
    table = measure.class_distance(routes)
    order = table.drop_duplicates("class_a").sort_values("order_a")["class_a"].tolist()
    assert {*order[:2]} in ({"class 0", "class 2"}, {"class 1", "class 3"})


def test_classes_with_one_image_are_left_out():
    routes = made_routes(experts={0: np.eye(5, 17, dtype=int)}, labels=[0, 0, 1, 1, 2])
    assert set(measure.class_distance(routes)["class_a"]) == {"class 0", "class 1"}


def test_relatedness_is_the_rank_correlation_over_pairs_and_beats_permuted_classes():
    model, rng = toy_vit(), np.random.default_rng(0)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(3))
    rows = normalize(model.head.weight[:5].double()).numpy()
    own, js, pairs = 1 - rows @ rows.T, rng.random((5, 5)), np.triu_indices(5, 1)
    a, b = np.indices((5, 5)).reshape(2, -1)
    table = pd.DataFrame({"system": "MoEE", "class_index_a": a, "class_index_b": b})
    tables = [table.assign(layer=n, js=each.ravel()) for n, each in enumerate((js + js.T, own))]
    found = measure.class_relatedness(pd.concat(tables), model, permutations=200)
    expected = spearmanr((js + js.T)[pairs], own[pairs]).statistic
    assert found["spearman"].tolist() == pytest.approx([expected, 1])
    assert found["p"][1] < 0.1
    assert found["null_high"][1] < 1
