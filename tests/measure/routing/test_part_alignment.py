from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.part_alignment import (
    adjusted_mutual_information,
    expected_information,
    patch_parts,
)
from tests.helpers.images import toy_images
from tests.helpers.routes import GRID, PARTS, drawn_routes, made_routes, masked_images

QUICK = {"permutations": 20, "resamples": 20}


@pytest.fixture(scope="module")
def images():
    return masked_images(40)


def parts_of(images):
    return np.stack([patch_parts(mask, GRID, len(PARTS)) for mask in images.masks])


def routed_by(experts):
    """One CLS token before the patches, to an expert of its own."""
    experts = np.insert(experts, 0, experts.max() + 1, axis=1)
    return made_routes(experts={0: experts}, labels=np.arange(len(experts)) % 4)


@pytest.mark.parametrize("seed", range(5))
def test_ami_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 9, size=3000)
    experts = np.where(rng.random(3000) < 0.4, parts % 5, rng.integers(0, 6, size=3000))
    table = np.zeros((6, 12), dtype=int)
    np.add.at(table, (experts, parts), 1)
    found = adjusted_mutual_information(table, expected_information(table))
    assert found == pytest.approx(adjusted_mutual_info_score(parts, experts), abs=1e-9)


def test_the_measure_agrees_with_scikit_learn(images):
    routes = drawn_routes(classes=4, each=10)
    table = measure.modularity(routes, images, **QUICK).set_index("layer")
    for layer in (0, 1):
        experts = routes.experts[layer][:, 1:]
        expected = adjusted_mutual_info_score(parts_of(images).ravel(), experts.ravel())
        assert table.loc[layer, "ami"] == pytest.approx(expected, abs=1e-9)


def test_experts_that_are_parts_score_one(images):
    table = measure.modularity(routed_by(parts_of(images)), images, **QUICK).iloc[0]
    assert table["ami"] == pytest.approx(1)
    assert table["p"] == table["class_p"] == pytest.approx(1 / 21)
    assert table["low"] > table["null_high"] > table["token_null_high"]
    assert table["tokens"] == 40 * 16


def test_experts_of_a_place_know_no_more_than_the_place(images):
    """Rows of patches predict sky and ground; exchanging the masks does not change that."""
    rows = np.tile(np.repeat(np.arange(4), 4), (40, 1))
    table = measure.modularity(routed_by(rows), images, **QUICK).iloc[0]
    assert table["ami"] > 0.3
    assert table["null_mean"] == pytest.approx(table["ami"], abs=0.02)
    assert table["excess"] == pytest.approx(0, abs=0.02)
    assert table["token_null_high"] < 0.05


def test_experts_of_a_class_know_no_more_than_the_class():
    """The part depends on the class only; masks exchanged within a class say the same."""
    labels = np.arange(40) % 4
    images = replace(masked_images(40), masks=np.repeat(labels, 64).reshape(40, 8, 8))
    routes = routed_by(np.repeat(labels, 16).reshape(40, 16))
    table = measure.modularity(routes, images, **QUICK).iloc[0]
    assert table["ami"] == pytest.approx(1)
    assert table["class_null_mean"] == pytest.approx(1)
    assert table["class_p"] == 1
    assert table["p"] == pytest.approx(1 / 21)


def test_a_patch_shows_the_part_that_covers_most_of_it():
    mask = np.array([[0, 0, 2, 1], [0, 1, 2, 2], [3, 3, 1, 1], [3, 3, 1, 1]], dtype=np.uint8)
    assert patch_parts(mask, (2, 2), 4).tolist() == [0, 2, 3, 1]


def test_patches_that_do_not_divide_the_mask():
    mask = np.repeat(np.arange(10, dtype=np.uint8)[:, None], 10, axis=1)
    assert patch_parts(mask, (3, 1), 10).tolist() == [0, 4, 7]


def test_profile_shares_sum_to_one(images):
    routes = drawn_routes(classes=4, each=10)
    table = measure.part_profile(routes, images, layers=[1])
    assert table.groupby("expert")["share"].sum().to_numpy() == pytest.approx(1)
    assert table.drop_duplicates("part")["share_all"].sum() == pytest.approx(1)
    assert table.drop_duplicates("expert")["size"].sum() == pytest.approx(1)
    assert table["tokens"].sum() == 40 * 16
    assert set(table["part"]) == set(PARTS)


def test_profile_of_experts_that_are_parts(images):
    table = measure.part_profile(routed_by(parts_of(images)), images)
    own = table[table["part"] == table["expert"].map(dict(enumerate(PARTS)))]
    assert own["share"].tolist() == [1] * len(PARTS)
    assert table.loc[table["expert"] == len(PARTS), "tokens"].sum() == 0


def test_photographs_have_no_parts():
    with pytest.raises(MoeeError, match="only the bundled scenes"):
        measure.modularity(drawn_routes(), toy_images(4))


def test_routes_of_other_images_are_refused(images):
    with pytest.raises(MoeeError, match="routes of 80"):
        measure.modularity(drawn_routes(classes=4, each=20), images)


def test_several_experts_per_token_are_refused(images):
    routes = replace(drawn_routes(classes=4, each=10), experts={})
    with pytest.raises(MoeeError, match="one expert per token"):
        measure.modularity(routes, images)


def test_layers_whose_patches_have_no_known_places_are_left_out(images):
    routes = drawn_routes(classes=4, each=10)
    some, none = (
        replace(routes, grid=grid) for grid in ({0: (1, 16), 1: (4, 4)}, {0: (1, 16), 1: (0, 0)})
    )
    assert measure.part_profile(some, images)["layer"].unique().tolist() == [1]
    with pytest.raises(MoeeError, match="known places"):
        measure.modularity(none, images)
