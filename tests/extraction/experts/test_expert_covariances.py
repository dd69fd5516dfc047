from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction.experts import expert_covariances as moments
from moee_analysis.extraction.experts.expert_covariances import MomentTally, covariances
from moee_analysis.extraction.experts.expert_statistics import ExpertTally, statistics_of
from moee_analysis.extraction.record.accumulate import summed_alone
from moee_analysis.extraction.record.calibration_set import Limits
from tests.helpers.makers import sample_of
from tests.helpers.planted import Made, added_up, agree, assigned, layer_of, parts_of

ROWS, DIM, HIDDEN, EXPERTS = 90, 4, 7, 3
MEMBERS = np.random.default_rng(1).integers(-1, EXPERTS, size=ROWS)
CUTS = (1, 30, 88)


@pytest.fixture
def layer():
    return layer_of(drawn())


def drawn():
    rng = np.random.default_rng(0)
    hidden = (rng.normal(size=(ROWS, HIDDEN)) @ rng.normal(size=(HIDDEN, HIDDEN))).astype("f2")
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), 6)
    return sample_of(
        hidden,
        inputs=rng.normal(size=(ROWS, DIM)).astype("f2"),
        weight=rng.integers(1, 5, size=ROWS).astype("f4"),
        image=image,
        position=position,
    )


def expected(sample, rows):
    """Covariance, every row repeated as often as its weight says."""
    hidden = np.repeat(sample.hidden[rows].astype("f8"), sample.weight[rows].astype(int), axis=0)
    return np.cov(hidden.T, bias=True)


def means_of(layer, assignment):
    tally = ExpertTally(layer.site, assignment, gradients=False)
    return statistics_of(tally, summed_alone(tally, layer)).means


def found_in(layer, root, members=MEMBERS, *, limits=None, **given):
    """Every expert's covariance, in the order in which they come."""
    assignment = assigned(members, **given)
    made = Made([layer], root, cuts=CUTS, limits=limits or Limits())
    means = {"mlp": means_of(layer, assignment)}
    found = list(covariances(made, {"mlp": assignment}, means, label="covariances"))
    assert [(name, expert) for name, expert, _ in found] == [
        ("mlp", expert) for expert in range(assignment.experts)
    ]
    return [covariance.numpy() for *_, covariance in found]


def close(covariance, wanted, *, rtol=1e-5):
    np.testing.assert_allclose(covariance, wanted, rtol=rtol, atol=rtol * wanted.max())


# One tally


@pytest.mark.parametrize("chunk", [1, 7, 90])
@pytest.mark.parametrize("experts", [range(3), range(1, 3), range(1)])
def test_products_equal_a_slow_loop(layer, monkeypatch, chunk, experts):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    means = np.random.default_rng(2).normal(size=(EXPERTS, HIDDEN))
    sums = summed_alone(MomentTally(layer.site, assigned(MEMBERS), experts, means), layer)
    for place, expert in enumerate(experts):
        total = np.zeros((HIDDEN, HIDDEN))
        for row in np.flatnonzero(expert == MEMBERS):
            apart = layer.sample.hidden[row].astype("f8") - means[expert]
            total += layer.sample.weight[row] * np.outer(apart, apart)
        np.testing.assert_allclose(sums["products"][place], total, rtol=1e-5, atol=1e-4)
        assert sums["weight"][place] == layer.sample.weight[expert == MEMBERS].sum()


@pytest.mark.parametrize("cuts", [(1,), CUTS, range(1, ROWS)])
@pytest.mark.parametrize("prefix", [(), (0, 1)])
def test_parts_add_up_to_one_pass(layer, cuts, prefix):
    assignment = assigned(MEMBERS, prefix=prefix)
    means = means_of(layer, assignment)
    tally = MomentTally(layer.site, assignment, range(1, assignment.experts), means)
    agree(added_up(tally, parts_of(layer, cuts)), summed_alone(tally, layer))


def test_experts_and_means_are_among_the_facts(layer):
    means = means_of(layer, assigned(MEMBERS))
    tally = MomentTally(layer.site, assigned(MEMBERS), range(2), means)
    others = [
        replace(tally, experts=range(1, 3)),
        replace(tally, means=means + 1),
        replace(tally, assignment=assigned(MEMBERS[::-1])),
    ]
    assert len({str(each.facts) for each in (tally, *others)}) == 4


# Covariances


@pytest.mark.parametrize("prefix", [(), (0,), (0, 0), (0, 1)])
def test_covariances_count_every_token_as_often_as_it_stands_for(layer, tmp_path, prefix):
    _, members = assigned(MEMBERS, prefix=prefix).of(layer)
    for expert, covariance in enumerate(found_in(layer, tmp_path, prefix=prefix)):
        close(covariance, expected(layer.sample, np.flatnonzero(members == expert)))


@pytest.mark.parametrize("chunk", [20, 90])
def test_a_large_common_mean_costs_no_precision(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    plain = drawn()
    far = layer_of(replace(plain, hidden=plain.hidden.astype("f4") + 3000))
    for expert, covariance in enumerate(found_in(far, tmp_path)):
        rows = np.flatnonzero(expert == MEMBERS)
        np.testing.assert_allclose(covariance, expected(plain, rows), atol=2e-3)
        close(covariance, expected(far.sample, rows))


def test_a_covariance_is_symmetric_and_never_negative(layer, tmp_path):
    for covariance in found_in(layer, tmp_path):
        np.testing.assert_allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6)
        assert np.linalg.eigvalsh(covariance).min() > -1e-6


def test_a_single_token_and_none_have_no_covariance(layer, tmp_path):
    members = np.where(np.arange(ROWS) == 4, 1, 0)
    found = found_in(layer, tmp_path, members, experts=3)
    assert found[0].any()
    assert not found[1].any()
    assert not found[2].any()


@pytest.mark.parametrize(("held", "passes"), [(0.01, 4), (1, 4), (2, 2), (3, 2), (4, 1), (100, 1)])
def test_experts_come_in_as_many_passes_as_memory_asks_for(layer, tmp_path, held, passes):
    """``held`` covariances of an expert fit, and a little more for the numbers of tokens."""
    memory = Limits(memory=held * (8 * HIDDEN**2 + 8))
    assignment = assigned(MEMBERS, prefix=(0,))
    means = {"mlp": means_of(layer, assignment)}
    made = Made([layer], tmp_path, cuts=CUTS, limits=memory)
    found = list(covariances(made, {"mlp": assignment}, means, label="covariances"))
    assert len(made.reads) == passes
    plain = found_in(layer, tmp_path, prefix=(0,))
    for (*_, covariance), whole in zip(found, plain, strict=True):
        np.testing.assert_array_equal(covariance, whole)


def test_layers_come_one_after_the_other(layer, tmp_path):
    other = replace(layer, site=replace(layer.site, name="other", index=1))
    made = Made([layer, other], tmp_path, cuts=CUTS)
    assignments = {"other": assigned(MEMBERS, prefix=(0,)), "mlp": assigned(MEMBERS)}
    means = {name: means_of(layer, each) for name, each in assignments.items()}
    found = [(n, e) for n, e, _ in covariances(made, assignments, means, label="both")]
    assert found == [("mlp", e) for e in range(3)] + [("other", e) for e in range(4)]
    assert len(made.reads) == 1
