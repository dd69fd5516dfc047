"""Sums over the tokens of experts: statistics, covariances, and the normal equations of a refit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.extraction.experts import neuron_scores
from moee_analysis.extraction.experts.layer_experts import (
    LayerExperts,
    StatisticsAccumulator,
    gather_statistics,
)
from moee_analysis.extraction.experts.neuron_scores import CovarianceAccumulator, gather_covariances
from moee_analysis.extraction.experts.refit_w2 import RefitAccumulator, shared_readout
from moee_analysis.extraction.record import fisher
from moee_analysis.extraction.record import tokens as recorded
from moee_analysis.extraction.record.fisher import DAMPING, PRIOR
from moee_analysis.extraction.record.token_source import Limits
from tests.helpers.layers import (
    Made,
    added_up,
    agree,
    assigned,
    computed,
    layer_of,
    parts_of,
    random_layer,
    repeated,
    sums_of,
)

ROWS, DIM, HIDDEN, EXPERTS = 60, 5, 7, 3
MEMBERS = np.random.default_rng(1).integers(-1, EXPERTS, size=ROWS)
CUTS = (1, 23, 24, 59)
PREFIXES = [(), (0,), (0, 0), (0, 1)]


@pytest.fixture
def layer():
    return random_layer(rows=ROWS, dim=DIM, hidden=HIDDEN)


def statistics_sum(layer, members=MEMBERS, *, gradients=False, **given):
    return StatisticsAccumulator(layer.site, assigned(members, dim=DIM, **given), gradients)


def covariance_sum(layer, *, experts=range(EXPERTS), **given):
    assignment = assigned(MEMBERS, dim=DIM, **given)
    means = np.random.default_rng(2).normal(size=(assignment.experts, HIDDEN))
    return CovarianceAccumulator(layer.site, assignment, experts, means)


def refit_sum(layer, *, everything=False, **given):
    assignment, rng = assigned(MEMBERS, dim=DIM, **given), np.random.default_rng(2)
    kept = (rng.random((assignment.experts, HIDDEN)) < 0.5) | everything
    means, weights = rng.normal(2, 1, size=kept.shape), rng.random(len(kept))
    return RefitAccumulator(layer.site, assignment, kept, means, weights)


SUMS = [statistics_sum, lambda e, **given: statistics_sum(e, gradients=True, **given),
        covariance_sum, refit_sum]  # fmt: skip


@pytest.mark.parametrize("cuts", [(1,), CUTS, range(1, ROWS)])
@pytest.mark.parametrize("prefix", [(), (0, 1)])
@pytest.mark.parametrize("make", SUMS)
def test_parts_add_up_to_one_pass(layer, make, cuts, prefix):
    accumulator = make(layer, prefix=prefix)
    agree(added_up(accumulator, parts_of(layer, cuts)), sums_of(accumulator, layer))


def test_all_that_decides_the_sums_is_among_their_facts(layer):
    plain = [make(layer) for make in SUMS]
    others = [replace(each, assignment=assigned(MEMBERS[::-1], dim=DIM)) for each in plain]
    others += [replace(each, means=each.means + 1) for each in plain[2:]]
    others += [replace(plain[2], experts=range(1, 3)), replace(plain[3], kept=~plain[3].kept)]
    others += [replace(plain[3], weights=plain[3].weights + 1)]
    others += [replace(plain[0], site=replace(layer.site, name="other", index=1))]
    assert len({str(each.facts) for each in plain + others}) == len(plain + others)


# Statistics


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_statistics_are_those_of_tokens_repeated_by_weight(layer, monkeypatch, chunk, prefix):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    accumulator = statistics_sum(layer, prefix=prefix)
    found = computed(accumulator, layer)
    routed, members = accumulator.assignment.of(layer)
    for expert in range(len(set(prefix)) + EXPERTS):
        tokens = repeated(layer.sample, members == expert)
        assert found.weight[expert] == len(tokens)
        assert found.routed[expert] == layer.sample.weight[routed == expert].sum()
        np.testing.assert_allclose(found.means[expert], tokens.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(found.variance[expert], tokens.var(axis=0), rtol=1e-8)
    assert found.routed.sum() == layer.sample.weight.sum()
    assert found.weight.sum() < found.routed.sum()  # some count for none
    assert found.metrics is None
    assert all(v.dtype == np.float64 for v in vars(found).values() if v is not None)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_metrics_are_those_of_the_expert_s_tokens_and_of_their_kind(layer, monkeypatch, chunk):
    monkeypatch.setattr(fisher, "CHUNK", chunk)
    accumulator = statistics_sum(layer, gradients=True, prefix=(0,), experts=EXPERTS + 1)
    sample, (_, members) = layer.sample, accumulator.assignment.of(layer)
    own, kinds = np.zeros((EXPERTS + 2, DIM, DIM)), np.zeros((2, DIM, DIM))
    for row in range(ROWS):
        for g in sample.gradients([row])[:, 0].astype(float):
            product = sample.weight[row] * np.outer(g, g) / 2
            kinds[int(sample.position[row] > 0)] += product
            if members[row] >= 0:
                own[members[row]] += product
    found = computed(accumulator, layer)
    assert found.metrics.dtype == np.float32
    assert found.weight[-1] == 0  # then the metric is that of its kind
    for expert, metric in enumerate(found.metrics):
        kind = int(expert > 0)
        prior = kinds[kind] / sample.weight[(sample.position > 0) == kind].sum()
        Q = (own[expert] + PRIOR * prior) / (found.weight[expert] + PRIOR)
        expected = (Q + DAMPING * np.trace(Q) / DIM * np.eye(DIM)) / 2
        np.testing.assert_allclose(metric, expected, rtol=1e-5, atol=1e-6)


def test_experts_of_one_token_or_none_have_no_variance_and_finite_numbers(layer):
    members = np.where(np.arange(ROWS) == 4, 1, 0)
    found = computed(statistics_sum(layer, members, experts=3, gradients=True), layer)
    np.testing.assert_allclose(found.means[1:], [layer.sample.hidden[4], np.zeros(HIDDEN)])
    assert found.variance[1:].max() < 1e-5 * found.variance[0].max()
    assert np.isfinite(found.metrics).all()
    assert np.linalg.eigvalsh(found.metrics[2]).min() > 0
    layer.sample.hidden[:, 0] = 1000.1  # nor is a variance of rounded sums negative
    found = computed(statistics_sum(layer), layer)
    assert (found.variance >= 0).all()
    assert (found.variance[:, 0] < 1e-6).all()


def two_layers(layer, root):
    other = replace(layer, site=replace(layer.site, name="other", index=1))
    return Made([layer, other], root, CUTS)


ASSIGNED = {
    "mlp": assigned(MEMBERS, dim=DIM),
    "other": assigned(np.zeros(ROWS, int), dim=DIM, prefix=(0,), experts=2),
}


@pytest.mark.parametrize("gradients", [False, True])
def test_all_layers_are_gathered_in_one_pass_and_found_again(layer, tmp_path, gradients):
    made = two_layers(layer, tmp_path)
    found = gather_statistics(made, ASSIGNED, gradients=gradients)
    again = gather_statistics(made, ASSIGNED, gradients=gradients)
    assert len(made.reads) == 1
    for name, statistics in found.items():
        alone = computed(StatisticsAccumulator(layer.site, ASSIGNED[name], gradients), layer)
        assert (statistics.metrics is not None) is gradients
        for array, values in vars(alone).items():
            if values is not None:
                own = getattr(statistics, array)
                np.testing.assert_allclose(own, values, rtol=1e-5, atol=1e-6, err_msg=array)
                np.testing.assert_array_equal(own, getattr(again[name], array))
    assert found["other"].weight[2] == 0  # experts without tokens keep their place
    assert gather_statistics(made, {}, gradients=gradients) == {}
    assert len(made.reads) == 1


# Covariances


def experts_of(layer, assignment):
    statistics = computed(StatisticsAccumulator(layer.site, assignment, gradients=False), layer)
    given = {"partition": assignment.partition, "statistics": statistics}
    return LayerExperts(layer.site, 6, assignment.prefix, **given)


def covariances(made, *experts):
    found = list(gather_covariances(made, experts, label="covariances"))
    order = [(each.site.name, number) for each, number, _ in found]
    return order, [covariance.numpy() for *_, covariance in found]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("far", [0, 3000])  # a large common mean costs no precision
def test_covariances_are_those_of_tokens_repeated(layer, tmp_path, monkeypatch, prefix, far):
    monkeypatch.setattr(neuron_scores, "CHUNK", 7)
    plain = layer.sample
    layer = layer_of(replace(plain, hidden=plain.hidden.astype("f4") + far))
    assignment = assigned(MEMBERS, dim=DIM, prefix=prefix)
    _, members = assignment.of(layer)
    _, found = covariances(Made([layer], tmp_path, CUTS), experts_of(layer, assignment))
    for expert, covariance in enumerate(found):
        wanted = np.cov(repeated(plain, members == expert).T, bias=True)
        np.testing.assert_allclose(covariance, wanted, atol=2e-3 if far else 1e-4)
        np.testing.assert_allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6)
        assert np.linalg.eigvalsh(covariance).min() > -1e-5


@pytest.mark.parametrize(("held", "passes"), [(0.01, 4), (1, 4), (2, 2), (3, 2), (4, 1), (100, 1)])
def test_experts_come_in_as_many_passes_as_memory_asks_for(layer, tmp_path, held, passes):
    """``held`` covariances of an expert fit, and a little more for the numbers of tokens."""
    limits = Limits(memory=held * (8 * HIDDEN**2 + 8))
    experts = experts_of(layer, assigned(MEMBERS, dim=DIM, prefix=(0,)))
    made = Made([layer], tmp_path, CUTS, limits=limits)
    order, found = covariances(made, experts)
    assert (len(made.reads), order) == (passes, [("mlp", expert) for expert in range(4)])
    np.testing.assert_array_equal(found, covariances(Made([layer], tmp_path, CUTS), experts)[1])
    made = two_layers(layer, tmp_path)  # one layer comes after the other
    order, _ = covariances(made, *(experts_of(e, ASSIGNED[e.site.name]) for e in made.layers))
    assert order == [(name, expert) for name in ("mlp", "other") for expert in range(3)]
    assert len(made.reads) == 1


# The normal equations of a refit


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_normal_equations_equal_a_slow_loop(layer, monkeypatch, chunk, prefix):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    accumulator = refit_sum(layer, prefix=prefix)
    _, members = accumulator.assignment.of(layer)
    across, within = torch.zeros(2, HIDDEN, HIDDEN, dtype=torch.float64)
    for row in np.flatnonzero(members >= 0):
        expert = members[row]
        apart = layer.sample.hidden[row].astype("f8") - accumulator.means[expert]
        own = apart * accumulator.kept[expert]
        weight = accumulator.weights[expert] * layer.sample.weight[row]
        across += torch.from_numpy(weight * np.outer(apart, own))
        within += torch.from_numpy(weight * np.outer(own, own))
    agree(computed(accumulator, layer), {"across": across, "within": within}, rtol=1e-5)


def test_w2_comes_back_from_sums_in_single_precision_where_all_neurons_are_kept(layer):
    """However alike the neurons are: then rounding is large beside what tells them apart."""
    hidden = layer.sample.hidden.astype("f4")
    flat = layer_of(replace(layer.sample, hidden=hidden[:, :1] * hidden[0] + 0.001 * hidden))
    accumulator = refit_sum(flat, everything=True)
    W2 = torch.randn(DIM, HIDDEN, generator=torch.Generator().manual_seed(0))
    kept = torch.from_numpy(accumulator.kept)
    means = torch.from_numpy(accumulator.means).float()
    found = shared_readout(W2, kept, means, computed(accumulator, flat))
    torch.testing.assert_close(found.weight, W2)
