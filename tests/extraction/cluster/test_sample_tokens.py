from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction.cluster.sample_tokens import (
    DrawTally,
    draw_of,
    drawn,
    inputs_at,
    rows_to_cluster,
)
from moee_analysis.extraction.record import layer_tokens as recorded
from moee_analysis.extraction.record.accumulate import summed_alone
from tests.helpers.layers import (
    Made,
    added_up,
    agree,
    draw_from,
    layer_of,
    part_of,
    parts_of,
    sample_of,
)
from tests.helpers.runs import best, quick

IMAGES, TOKENS, DIM, HIDDEN = 12, 5, 4, 6
ROWS = IMAGES * TOKENS
CUTS = (1, 17, 40)


@pytest.fixture
def layer():
    """Five tokens of each image, with gradients; half of the patches are in the sample."""
    rng = np.random.default_rng(0)
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), TOKENS)
    return layer_of(
        sample_of(
            rng.normal(size=(ROWS, HIDDEN)).astype("f2"),
            inputs=rng.normal(1, 1, size=(ROWS, DIM)).astype("f2"),
            gradients=rng.normal(size=(2, ROWS, DIM)).astype("f2"),
            image=image,
            position=2 * position,
            weight=np.where(position, 2, 1).astype("f4"),
        )
    )


# Which tokens


@pytest.mark.parametrize("leading", [0, 1, 3])
@pytest.mark.parametrize("wanted", [7, 40, 10_000])
def test_drawn_tokens_are_so_many_different_ones_that_are_not_leading(
    layer, tmp_path, leading, wanted
):
    made = Made([layer], tmp_path, quick(cluster_tokens=wanted).resolved())
    rows = rows_to_cluster(made, layer.site, leading)
    others = np.flatnonzero(np.arange(ROWS) % TOKENS >= leading)
    assert len(rows) == len(set(rows)) == min(wanted, len(others))
    assert set(rows) <= set(others)
    assert rows.tolist() == sorted(rows)
    if wanted == 10_000:
        np.testing.assert_array_equal(rows, others)


def test_drawn_tokens_are_the_same_as_out_of_all_candidates(layer, tmp_path):
    made = Made([layer], tmp_path, quick(cluster_tokens=20, seed=3).resolved())
    candidates = np.flatnonzero(layer.sample.position >= 1)
    rng = np.random.default_rng([3, layer.site.index])
    expected = candidates[np.sort(rng.choice(len(candidates), size=20, replace=False))]
    np.testing.assert_array_equal(rows_to_cluster(made, layer.site, 1), expected)


def test_every_layer_and_every_seed_draws_its_own(layer, tmp_path):
    draws = {
        tuple(
            rows_to_cluster(
                Made([layer], tmp_path, quick(cluster_tokens=20, seed=seed).resolved()),
                replace(layer.site, index=index),
                0,
            )
        )
        for seed in (0, 1)
        for index in (0, 1)
    }
    assert len(draws) == 4


# What is known of them


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_draw_holds_the_tokens_and_what_all_they_are_drawn_from_have_in_common(
    layer, monkeypatch, leading, chunk
):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    rows, sample = np.array([6, 8, 29, 59]), layer.sample
    found = draw_from(layer, rows, leading=leading)
    np.testing.assert_array_equal(found.inputs, sample.inputs[rows].astype("f4"))
    np.testing.assert_array_equal(found.hidden, sample.hidden[rows].astype("f4"))
    assert found.inputs.dtype == found.hidden.dtype == np.float32
    others = sample.position >= leading
    inputs = sample.inputs[others].astype("f8")
    assert found.tokens == len(inputs)
    np.testing.assert_allclose(found.covariance, np.cov(inputs.T, bias=True), rtol=1e-5)
    total, weight = np.zeros((DIM, DIM)), 0.0
    for row in np.flatnonzero(others):
        for g in sample.gradients([row])[:, 0].astype("f8"):
            total += sample.weight[row] * np.outer(g, g) / 2
        weight += sample.weight[row]
    np.testing.assert_allclose(found.fisher, total / weight, rtol=1e-5)


def test_what_nobody_needs_is_none(layer):
    tally = DrawTally(layer.site, np.array([3, 4]), 0)
    found = draw_of(tally, summed_alone(tally, layer), layer.mlp, "key")
    assert found.hidden is found.fisher is None
    assert found.key == "key"
    np.testing.assert_array_equal(found.rows, [3, 4])


def test_rows_are_numbered_from_the_start_of_the_whole_sample(layer):
    later = part_of(layer, 30, 60)
    np.testing.assert_array_equal(
        draw_from(later, np.array([31, 58])).inputs, layer.sample.inputs[[31, 58]]
    )


def test_a_single_token_can_be_drawn(layer):
    assert draw_from(layer, np.array([59])).inputs.shape == (1, DIM)


@pytest.mark.parametrize("cuts", [CUTS, range(1, ROWS)])
def test_parts_add_up_to_the_whole(layer, cuts):
    rows = np.array([0, 1, 16, 17, 39, 40, 59])
    tally = DrawTally(layer.site, rows, 1, hidden=True, gradients=True)
    agree(added_up(tally, parts_of(layer, cuts)), summed_alone(tally, layer))


# All layers


def two_layers(layer, root, config):
    other = layer_of(
        replace(layer.sample, inputs=-layer.sample.inputs),
        site=replace(layer.site, name="other", index=1),
    )
    return Made([layer, other], root, config, CUTS)


@pytest.mark.parametrize(
    ("config", "hidden", "graded"), [(quick, True, False), (best, False, True)]
)
def test_all_layers_are_drawn_in_one_pass_and_hold_what_is_clustered(
    layer, tmp_path, config, hidden, graded
):
    made = two_layers(layer, tmp_path, config().resolved())
    draws = list(drawn(made, {"mlp": 1, "other": 0}))
    assert [draw.site.name for draw in draws] == ["mlp", "other"]
    assert len(made.reads) == 1
    for draw, each, leading in zip(draws, made.layers, (1, 0), strict=True):
        expected = np.flatnonzero(each.sample.position >= leading)
        np.testing.assert_array_equal(draw.rows, expected)
        np.testing.assert_array_equal(draw.inputs, each.sample.inputs[expected])
        assert (draw.hidden is not None) is hidden
        assert (draw.fisher is not None) is graded
        assert draw.mlp is each.mlp
        assert draw.key == made.key


def test_only_the_layers_that_are_asked_for_are_drawn(layer, tmp_path):
    made = two_layers(layer, tmp_path, quick().resolved())
    (draw,) = drawn(made, {"other": 0}, hidden=False)
    assert draw.site.name == "other"
    assert draw.hidden is None


def test_inputs_of_single_tokens_are_found_wherever_they_are(layer, tmp_path):
    made = two_layers(layer, tmp_path, quick().resolved())
    rows = {"mlp": np.array([0, 17, 59]), "other": np.array([16])}
    found = inputs_at(made, rows)
    assert list(found) == ["mlp", "other"]
    for each in made.layers:
        expected = each.sample.inputs[rows[each.site.name]].astype("f4")
        np.testing.assert_array_equal(found[each.site.name], expected)
        assert found[each.site.name].dtype == np.float32


def test_what_decides_the_sums_is_among_their_facts(layer):
    rows = np.array([1, 2, 3])
    tally = DrawTally(layer.site, rows, 1)
    others = [
        replace(tally, rows=rows + 1), replace(tally, leading=0), replace(tally, hidden=True),
    ]  # fmt: skip
    assert len({str(each.facts) for each in (tally, *others)}) == 4
