import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.measure.knockout.parts_unseen import Place
from tests.helpers.colours import COLOURS, colour_model, coloured_images
from tests.helpers.models import SMALL_CONVNEXT, lively, pixels_of, toy_moe, toy_swin, toy_vit

CALIBRATION, IMAGES = coloured_images(*range(100, 116)), coloured_images(*range(20))


def measured(**options):
    return measure.parts_unseen(colour_model(), IMAGES, CALIBRATION, resamples=50, **options)


@pytest.fixture(scope="module")
def table():
    return measured()


def changes(table, system):
    part = table[table["system"] == system]
    return part.pivot(index="part", columns="expert", values="change").loc[[*COLOURS, "black"]]


def test_each_colour_is_lost_with_its_expert_and_no_other(table):
    assert (table["recall_intact"] == 1).all()
    assert set(table.loc[table["part"] == "black", "patches"]) == {len(IMAGES) * 8}
    # black is the answer where nothing is known: its expert is not missed
    np.testing.assert_array_equal(changes(table, "expert"), -np.diag([1, 1, 1, 1, 0]))
    lost = np.diag(changes(table, "random patches"))[:4]  # half of them are black
    assert ((lost > -0.7) & (lost < -0.3)).all()


def test_intervals_hold_the_change_whatever_the_batches(table):
    assert table["change"].between(table["low"], table["high"]).all()
    assert measured(batch_size=7, layers=[0]).equals(table)


@pytest.mark.parametrize(("model", "grid", "layers"), [
    (toy_moe(toy_vit()), (4, 4), [0, 1]), (toy_moe(toy_swin()), (4, 4), [0]),
    (toy_moe(lively(SMALL_CONVNEXT)), None, None),
], ids=["vit", "swin", "convnext"])  # fmt: skip
def test_patches_are_read_row_by_row_where_they_enter_the_last_block(model, grid, layers):
    place = Place(model)
    patches = place.patches(pixels_of(model, count=2))
    assert patches.shape == (2, place.order.size, model.get_submodule(place.mlp).fc1.in_features)
    np.testing.assert_array_equal(place.order.ravel(), np.arange(place.order.size))
    assert grid in (None, place.order.shape)
    assert layers in (None, place.layers_before())
