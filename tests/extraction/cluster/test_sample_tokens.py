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
from tests.helpers import layers
from tests.helpers.runs import best, quick

IMAGES, TOKENS, DIM, HIDDEN = 12, 5, 4, 6
COUNT = IMAGES * TOKENS
CUTS = (1, 17, 40)
RNG = np.random.default_rng(0)
IMAGE, POSITION = np.divmod(np.arange(COUNT, dtype=np.int32), TOKENS)
SAMPLE = layers.sample_of(  # half of the patches
    RNG.normal(size=(COUNT, HIDDEN)).astype("f2"),
    inputs=RNG.normal(1, 1, size=(COUNT, DIM)).astype("f2"),
    gradients=RNG.normal(size=(2, COUNT, DIM)).astype("f2"),
    image=IMAGE, position=2 * POSITION, weight=np.where(POSITION, 2, 1).astype("f4"),
)  # fmt: skip
LAYER = layers.layer_of(SAMPLE)


@pytest.fixture
def two_layers(tmp_path):
    other = replace(LAYER.site, name="other", index=1)
    return layers.Made(
        [LAYER, layers.layer_of(replace(SAMPLE, inputs=-SAMPLE.inputs), site=other)], tmp_path, CUTS
    )


@pytest.mark.parametrize("leading", [0, 1, 3])
@pytest.mark.parametrize("wanted", [7, 40, 10_000])
@pytest.mark.parametrize(("seed", "index"), [(3, 0), (0, 1)])
def test_sampled_are_so_many_different_tokens_that_are_not_leading(
    tmp_path, leading, wanted, seed, index
):
    config = quick(cluster_tokens=wanted, seed=seed).resolved()
    site = replace(LAYER.site, index=index)
    rows = choose_rows(layers.Made([LAYER], tmp_path), site, config, leading=leading)
    others = np.flatnonzero(leading <= POSITION)
    rng, count = np.random.default_rng([seed, index]), min(wanted, len(others))
    expected = others[np.sort(rng.choice(len(others), size=count, replace=False))]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_sample_holds_its_tokens_and_statistics_of_all_that_it_is_from(
    monkeypatch, leading, chunk
):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    rows = np.array([6, 8, 29, 59])
    found = layers.draw_from(LAYER, rows, leading=leading)
    np.testing.assert_array_equal(found.inputs, SAMPLE.inputs[rows].astype("f4"))
    np.testing.assert_array_equal(found.hidden, SAMPLE.hidden[rows].astype("f4"))
    assert found.inputs.dtype == found.hidden.dtype == np.float32
    others = np.flatnonzero(SAMPLE.position >= leading)
    covariance = np.cov(SAMPLE.inputs[others].astype("f8").T, bias=True)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-5)
    total = np.zeros((DIM, DIM))
    for row in others:
        for g in SAMPLE.gradients([row])[:, 0].astype("f8"):
            total += SAMPLE.weight[row] * np.outer(g, g) / 2
    np.testing.assert_allclose(found.fisher, total / SAMPLE.weight[others].sum(), rtol=1e-5)
    rows = np.array([31, 58])  # are numbered from the start
    part = layers.draw_from(layers.part_of(LAYER, 30, 60), rows)
    np.testing.assert_array_equal(part.inputs, SAMPLE.inputs[rows])


@pytest.mark.parametrize("cuts", [CUTS, range(1, COUNT)])
def test_parts_add_up_to_the_whole_and_what_nobody_needs_is_none(cuts):
    rows = np.array([0, 1, 16, 17, 39, 40, 59])
    accumulator = SampleAccumulator(LAYER.site, rows, 1, hidden=True, gradients=True)
    whole = layers.sums_of(accumulator, LAYER)
    layers.agree(layers.added_up(accumulator, layers.parts_of(LAYER, cuts)), whole)
    found = layers.computed(SampleAccumulator(LAYER.site, rows, 0), LAYER)
    assert found.hidden is found.fisher is None
    np.testing.assert_array_equal(found.rows, rows)


@pytest.mark.parametrize(
    ("config", "hidden", "graded"), [(quick, True, False), (best, False, True)]
)
def test_all_layers_are_sampled_in_one_pass_and_hold_what_is_clustered(
    two_layers, config, hidden, graded
):
    config = config().resolved()
    samples = list(sample_tokens(two_layers, config, {"mlp": 1, "other": 0}))
    assert [sample.site.name for sample in samples] == ["mlp", "other"]
    assert len(two_layers.reads) == 1
    for sample, each, leading in zip(samples, two_layers.layers, (1, 0), strict=True):
        expected = np.flatnonzero(each.sample.position >= leading)
        np.testing.assert_array_equal(sample.rows, expected)
        np.testing.assert_array_equal(sample.inputs, each.sample.inputs[expected])
        assert (sample.hidden is not None, sample.fisher is not None) == (hidden, graded)
        assert (sample.mlp, sample.key) == (each.mlp, two_layers.key)
    (single,) = sample_tokens(two_layers, config, {"other": 0}, hidden=False)
    assert (single.site.name, single.hidden) == ("other", None)


def test_inputs_of_single_tokens_are_found_wherever_they_are(two_layers):
    rows = {"mlp": np.array([0, 17, 59]), "other": np.array([16])}
    found = pick_inputs(two_layers, rows)
    assert list(found) == ["mlp", "other"]
    for each in two_layers.layers:
        expected = each.sample.inputs[rows[each.site.name]].astype("f4")
        np.testing.assert_array_equal(found[each.site.name], expected)
        assert found[each.site.name].dtype == np.float32


def test_all_that_decides_the_sums_is_among_their_facts():
    accumulator = SampleAccumulator(LAYER.site, np.array([1, 2, 3]), 1)
    others = [{}, {"rows": accumulator.rows + 1}, {"leading": 0}, {"hidden": True}]
    assert len({str(replace(accumulator, **other).facts) for other in others}) == 4
