import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.merging import _in_common
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import merge_tokens
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_swin, toy_vit

SCHEDULE, IMAGES = (0, 5, 3), toy_images(6)


def merged(model):
    return merge_tokens(model, SCHEDULE, lambda _: WardCosts(by_importance=False))


def values(table, quantity, pairs):
    rows = table[(table["quantity"] == quantity) & (table["pairs"] == pairs)]
    return rows.set_index("layer")["value"]


def loop(places, labels):
    """Means over patches that do not stand alone, pair by pair."""
    rows, columns = places.shape[1:]
    spots = [(y, x) for y in range(rows) for x in range(columns)]
    found = {}
    for image, label in zip(places, labels, strict=True):
        for one in spots:
            others = [two for two in spots if two != one]
            own = [two for two in others if image[two] == image[one]]
            near = [two for two in others if abs(two[0] - one[0]) + abs(two[1] - one[1]) == 1]
            kinds = {"merged": own, "random": others, "neighbours": near} if own else {}
            for pairs, among in kinds.items():
                same = np.mean([label[two] == label[one] for two in among])
                far = np.mean([np.hypot(two[0] - one[0], two[1] - one[1]) for two in among])
                found.setdefault(("part", pairs), []).append(same)
                found.setdefault(("distance", pairs), []).append(far)
    return {key: np.mean(each) for key, each in found.items()}


def test_pairs_are_those_of_a_loop_over_patches():
    rng = np.random.default_rng(0)
    places, parts = rng.integers(0, 7, size=(5, 3, 4)), rng.integers(0, 3, size=(5, 3, 4))
    found = {key: each[0].sum() / each[1].sum() for key, each in
             _in_common(places, {"part": parts.reshape(5, -1)}).items()}  # fmt: skip
    assert found == pytest.approx(loop(places, parts))


def test_tokens_are_as_many_as_the_schedule_leaves_and_hold_all_patches():
    table = measure.merging(merged(toy_vit()), IMAGES, resamples=5)
    assert values(table, "tokens", "merged").to_dict() == {0: 16, 1: 11, 2: 8}
    places = measure.token_places(merged(toy_vit()), IMAGES)
    for layer, tokens in places.items():
        counts = [np.unique(image, return_counts=True)[1] for image in tokens]
        assert {each.sum() for each in counts} == {16}
        assert values(table, "largest", "merged")[layer] == np.mean([c.max() for c in counts])
        alone = np.mean([(c == 1).sum() / 16 for c in counts])
        assert values(table, "alone", "merged")[layer] == pytest.approx(alone)
    assert table.groupby("layer")["merges"].first().tolist() == list(SCHEDULE)
    known = table.dropna(subset="value")
    assert (known["low"] <= known["high"]).all()
    assert table[table["layer"] == 0].query("quantity == 'distance'")["value"].isna().all()


def test_experts_are_those_of_patches_by_themselves_or_those_that_are_given():
    model = toy_moe(toy_vit())
    apart = measure.routes(model, IMAGES)
    found = measure.merging(merged(model), IMAGES, resamples=2)
    given = measure.merging(merged(toy_vit()), IMAGES, routed=apart, resamples=2)
    assert set(found["quantity"]) == set(given["quantity"]) == {
        "tokens", "alone", "largest", "expert", "distance",
    }  # fmt: skip
    places = measure.token_places(merged(model), IMAGES)[1]
    expected = loop(places, apart.patch_experts(1))["part", "merged"]
    # the second block's patches went through the first unmerged
    assert values(found, "expert", "merged")[1] == pytest.approx(expected)


def test_routes_of_other_images_are_refused():
    few = measure.routes(toy_moe(toy_vit()), IMAGES.take([0]))
    with pytest.raises(MoeeError, match="routes of the same 6 images; found routes of 1"):
        measure.merging(merged(toy_vit()), IMAGES, routed=few)


def test_parts_are_compared_where_images_know_them():
    images = load_images("bundled", limit=4)
    table = measure.merging(merged(toy_vit()), images, resamples=2)
    assert values(table, "part", "merged").notna().tolist() == [False, True, True]


@pytest.mark.parametrize("measured", [measure.merging, measure.token_places])
@pytest.mark.parametrize(("model", "images", "said"), [
    (toy_vit(), IMAGES, "tokens merge"),
    (toy_swin(), IMAGES, "tokens merge"),
    (merged(toy_vit()), IMAGES.take([]), "at least one image"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(measured, model, images, said):
    with pytest.raises(MoeeError, match=said):
        measured(model, images)
