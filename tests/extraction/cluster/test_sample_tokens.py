from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction.cluster.sample_tokens import (
    SampleAccumulator,
    choose_rows,
    pick_inputs,
    sample_tokens,
)
from moee_analysis.extraction.record import tokens as recorded
from tests.helpers.layers import (
    Made,
    added_up,
    agree,
    draw_from,
    layer_of,
    part_of,
    parts_of,
    sample_of,
    sums_of,
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
def test_sampled_are_so_many_different_tokens_that_are_not_leading(
    layer, tmp_path, leading, wanted
):
    config = quick(cluster_tokens=wanted, seed=3).resolved()
    rows = choose_rows(Made([layer], tmp_path), layer.site, config, leading=leading)
    others = np.flatnonzero(np.arange(ROWS) % TOKENS >= leading)
    rng, count = np.random.default_rng([3, layer.site.index]), min(wanted, len(others))
    expected = others[np.sort(rng.choice(len(others), size=count, replace=False))]
    np.testing.assert_array_equal(rows, expected)


def test_every_layer_and_every_seed_has_its_own_sample(layer, tmp_path):
    samples = {
        tuple(
            choose_rows(
                Made([layer], tmp_path), replace(layer.site, index=index),
                quick(cluster_tokens=20, seed=seed).resolved(), leading=0,
            )
        )
        for seed in (0, 1)
        for index in (0, 1)
    }  # fmt: skip
    assert len(samples) == 4


# What is known of them


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_sample_holds_its_tokens_and_statistics_of_all_that_it_is_from(
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
    np.testing.assert_allclose(found.covariance, np.cov(inputs.T, bias=True), rtol=1e-5)
    total, weight = np.zeros((DIM, DIM)), 0.0
    for row in np.flatnonzero(others):
        for g in sample.gradients([row])[:, 0].astype("f8"):
            total += sample.weight[row] * np.outer(g, g) / 2
        weight += sample.weight[row]
    np.testing.assert_allclose(found.fisher, total / weight, rtol=1e-5)
    part = draw_from(part_of(layer, 30, 60), np.array([31, 58]))  # rows are numbered from the start
    np.testing.assert_array_equal(part.inputs, sample.inputs[[31, 58]])


def test_what_nobody_needs_is_none(layer):
    accumulator = SampleAccumulator(layer.site, np.array([3, 4]), 0)
    found = accumulator.compute(sums_of(accumulator, layer))
    assert found.hidden is found.fisher is None
    np.testing.assert_array_equal(found.rows, [3, 4])


@pytest.mark.parametrize("cuts", [CUTS, range(1, ROWS)])
def test_parts_add_up_to_the_whole(layer, cuts):
    rows = np.array([0, 1, 16, 17, 39, 40, 59])
    accumulator = SampleAccumulator(layer.site, rows, 1, hidden=True, gradients=True)
    agree(added_up(accumulator, parts_of(layer, cuts)), sums_of(accumulator, layer))


# All layers


def two_layers(layer, root):
    other = layer_of(
        replace(layer.sample, inputs=-layer.sample.inputs),
        site=replace(layer.site, name="other", index=1),
    )
    return Made([layer, other], root, CUTS)


@pytest.mark.parametrize(
    ("config", "hidden", "graded"), [(quick, True, False), (best, False, True)]
)
def test_all_layers_are_sampled_in_one_pass_and_hold_what_is_clustered(
    layer, tmp_path, config, hidden, graded
):
    made, config = two_layers(layer, tmp_path), config().resolved()
    samples = list(sample_tokens(made, config, {"mlp": 1, "other": 0}))
    assert [sample.site.name for sample in samples] == ["mlp", "other"]
    assert len(made.reads) == 1
    for sample, each, leading in zip(samples, made.layers, (1, 0), strict=True):
        expected = np.flatnonzero(each.sample.position >= leading)
        np.testing.assert_array_equal(sample.rows, expected)
        np.testing.assert_array_equal(sample.inputs, each.sample.inputs[expected])
        assert (sample.hidden is not None, sample.fisher is not None) == (hidden, graded)
        assert (sample.mlp, sample.key) == (each.mlp, made.key)
    (single,) = sample_tokens(made, config, {"other": 0}, hidden=False)
    assert (single.site.name, single.hidden) == ("other", None)


def test_inputs_of_single_tokens_are_found_wherever_they_are(layer, tmp_path):
    made = two_layers(layer, tmp_path)
    rows = {"mlp": np.array([0, 17, 59]), "other": np.array([16])}
    found = pick_inputs(made, rows)
    assert list(found) == ["mlp", "other"]
    for each in made.layers:
        expected = each.sample.inputs[rows[each.site.name]].astype("f4")
        np.testing.assert_array_equal(found[each.site.name], expected)
        assert found[each.site.name].dtype == np.float32


def test_all_that_decides_the_sums_is_among_their_facts(layer):
    rows = np.array([1, 2, 3])
    accumulator = SampleAccumulator(layer.site, rows, 1)
    others = [{"rows": rows + 1}, {"leading": 0}, {"hidden": True}]
    facts = {str(replace(accumulator, **other).facts) for other in ({}, *others)}
    assert len(facts) == 4
