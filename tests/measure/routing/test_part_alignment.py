from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from moee_analysis import measure
from moee_analysis.measure.routing.part_alignment import all_patch_parts, patch_parts
from tests.helpers.routes import GRID, PARTS, drawn_routes, made_routes, masked_images

IMAGES = masked_images(40)
LABELS = np.arange(40) % 4
SHOWN = all_patch_parts(IMAGES, GRID)
ROUTES = drawn_routes(classes=4, each=10)


def routed_by(experts):
    """One CLS token before the patches, to an expert of its own."""
    return made_routes(experts={0: np.insert(experts, 0, experts.max() + 1, axis=1)}, labels=LABELS)


def modularity(routes, images=IMAGES):
    return measure.modularity(routes, images, permutations=20, resamples=20).set_index("layer")


def test_the_measure_agrees_with_scikit_learn_and_is_one_for_experts_that_are_parts():
    found = modularity(ROUTES)["ami"]
    for layer, experts in ROUTES.experts.items():
        expected = adjusted_mutual_info_score(SHOWN.ravel(), experts[:, 1:].ravel())
        assert found[layer] == pytest.approx(expected, abs=1e-9)
    row = modularity(routed_by(SHOWN)).loc[0]
    assert row["ami"] == pytest.approx(1)
    assert row["p"] == row["class_p"] == pytest.approx(1 / 21)
    assert row["low"] > row["null_high"]
    assert row["tokens"] == 40 * 16


def test_experts_of_a_place_know_no_more_than_the_place():
    """Rows of patches predict sky and ground; exchanging the masks does not change that."""
    row = modularity(routed_by(np.tile(np.repeat(np.arange(4), 4), (40, 1)))).loc[0]
    assert row["ami"] > 0.3
    assert row["null_mean"] == pytest.approx(row["ami"], abs=0.02)
    assert row["excess"] == pytest.approx(0, abs=0.02)


def test_experts_of_a_class_know_no_more_than_the_class():
    """The part depends on the class only; masks exchanged within a class say the same."""
    images = replace(IMAGES, masks=np.repeat(LABELS, 64).reshape(40, 8, 8))
    row = modularity(routed_by(np.repeat(LABELS, 16).reshape(40, 16)), images).loc[0]
    assert row["ami"] == row["class_null_mean"] == pytest.approx(1)
    assert row["class_p"] == 1
    assert row["p"] == pytest.approx(1 / 21)


def test_a_patch_shows_the_part_that_covers_most_of_it():
    mask = np.array([[0, 0, 2, 1], [0, 1, 2, 2], [3, 3, 1, 1], [3, 3, 1, 1]], dtype=np.uint8)
    assert patch_parts(mask, (2, 2), 4).tolist() == [0, 2, 3, 1]
    rows = np.repeat(np.arange(10, dtype=np.uint8)[:, None], 10, axis=1)
    assert patch_parts(rows, (3, 1), 10).tolist() == [0, 4, 7]  # the patches divide no mask


def test_profiles_sum_to_one_and_experts_that_are_parts_see_nothing_else():
    placed = replace(ROUTES, grid={0: (1, 16), 1: (4, 4)})  # layer 0 has no known places
    table = measure.part_profile(placed, IMAGES)
    assert set(table["layer"]) == {1}
    assert table.groupby("expert")["share"].sum().to_numpy() == pytest.approx(1)
    assert table.drop_duplicates("part")["share_all"].sum() == pytest.approx(1)
    assert table.drop_duplicates("expert")["size"].sum() == pytest.approx(1)
    assert table["tokens"].sum() == 40 * 16
    assert set(table["part"]) == set(PARTS)
    table = measure.part_profile(routed_by(SHOWN), IMAGES)
    own = table[table["part"] == table["expert"].map(dict(enumerate(PARTS)))]
    assert own["share"].tolist() == [1] * len(PARTS)
    assert table.loc[table["expert"] == len(PARTS), "tokens"].sum() == 0
