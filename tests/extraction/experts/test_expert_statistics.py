from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction.experts.expert_statistics import ExpertTally, gathered, statistics_of
from moee_analysis.extraction.record import layer_tokens as recorded
from moee_analysis.extraction.record.accumulate import summed_alone
from moee_analysis.extraction.record.fisher import DAMPING, PRIOR
from tests.helpers.makers import best, quick, sample_of
from tests.helpers.planted import Made, added_up, agree, assigned, layer_of, parts_of

ROWS, DIM, HIDDEN, EXPERTS = 60, 5, 7, 3
MEMBERS = np.random.default_rng(1).integers(-1, EXPERTS, size=ROWS)
CUTS = (1, 23, 24, 59)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), 6)
    sample = sample_of(
        rng.normal(2, 1, size=(ROWS, HIDDEN)).astype(np.float16),
        inputs=rng.normal(size=(ROWS, DIM)).astype(np.float16),
        gradients=rng.normal(size=(2, ROWS, DIM)).astype(np.float16),
        weight=rng.integers(1, 4, size=ROWS).astype(np.float32),
        image=image,
        position=position,
    )
    return layer_of(sample)


def tally_of(layer, members=MEMBERS, *, gradients=False, **given):
    return ExpertTally(layer.site, assigned(members, dim=DIM, **given), gradients)


def known_of(layer, *args, **given):
    tally = tally_of(layer, *args, **given)
    return statistics_of(tally, summed_alone(tally, layer))


def counted_one_by_one(sample, members, chosen):
    """Weight, means and variances of one expert, token by token."""
    rows = [row for row in range(ROWS) if members[row] == chosen]
    rows = [row for row in rows for _ in range(int(sample.weight[row]))]
    hidden = [[float(v) for v in sample.hidden[row]] for row in rows]
    means = [sum(column) / len(rows) for column in zip(*hidden, strict=True)]
    variances = [
        sum((v - m) ** 2 for v in column) / len(rows)
        for column, m in zip(zip(*hidden, strict=True), means, strict=True)
    ]
    return len(rows), means, variances


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("prefix", [(), (0,), (0, 0), (0, 1)])
def test_statistics_equal_a_slow_loop_that_repeats_each_token_by_its_weight(
    layer, monkeypatch, chunk, prefix
):
    monkeypatch.setattr(recorded, "CHUNK", chunk)
    tally = tally_of(layer, prefix=prefix)
    found = statistics_of(tally, summed_alone(tally, layer))
    routed, members = tally.assignment.of(layer)
    for chosen in range(len(set(prefix)) + EXPERTS):
        weight, means, variances = counted_one_by_one(layer.sample, members, chosen)
        assert found.weight[chosen] == weight
        assert found.routed[chosen] == layer.sample.weight[routed == chosen].sum()
        np.testing.assert_allclose(found.means[chosen], means, rtol=1e-10)
        np.testing.assert_allclose(found.variance[chosen], variances, rtol=1e-10)
    assert found.routed.sum() == layer.sample.weight.sum()
    assert found.weight.sum() < found.routed.sum()  # some count for none
    assert found.metrics is None
    assert all(v.dtype == np.float64 for v in vars(found).values() if v is not None)


@pytest.mark.parametrize("cuts", [(1,), CUTS, range(1, ROWS)])
@pytest.mark.parametrize("prefix", [(), (0,)])
def test_parts_add_up_to_one_pass(layer, cuts, prefix):
    tally = tally_of(layer, gradients=True, prefix=prefix)
    agree(added_up(tally, parts_of(layer, cuts)), summed_alone(tally, layer))


def test_gradients_are_summed_by_expert_and_by_kind_of_token(layer):
    tally = tally_of(layer, gradients=True, prefix=(0,))
    sums, sample = summed_alone(tally, layer), layer.sample
    _, members = tally.assignment.of(layer)
    experts, kinds = np.zeros((EXPERTS + 1, DIM, DIM)), np.zeros((2, DIM, DIM))
    of_kinds = np.zeros(2)
    for row in range(ROWS):
        kind = int(sample.position[row] > 0)
        of_kinds[kind] += sample.weight[row]
        for g in sample.gradients([row])[:, 0].astype(float):
            product = sample.weight[row] * np.outer(g, g) / 2
            kinds[kind] += product
            if members[row] >= 0:
                experts[members[row]] += product
    np.testing.assert_allclose(sums["fisher"], experts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums["kinds"], kinds, rtol=1e-5, atol=1e-5)
    assert sums["of_kinds"].tolist() == of_kinds.tolist()


def test_metrics_are_those_of_the_expert_s_tokens_and_of_their_kind(layer):
    tally = tally_of(layer, gradients=True, prefix=(0,))
    sums = summed_alone(tally, layer)
    found = statistics_of(tally, sums)
    assert found.metrics.dtype == np.float32
    for expert, metric in enumerate(found.metrics):
        kind = int(expert > 0)
        prior = sums["kinds"][kind] / sums["of_kinds"][kind]
        Q = (sums["fisher"][expert] + PRIOR * prior) / (float(sums["weight"][expert]) + PRIOR)
        expected = (Q.numpy() + DAMPING * np.trace(Q) / DIM * np.eye(DIM)) / 2
        np.testing.assert_allclose(metric, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_expert_without_tokens_has_no_variance_and_finite_numbers(layer, gradients):
    found = known_of(layer, np.zeros(ROWS, int), experts=2, gradients=gradients)
    assert found.weight.tolist() == [layer.sample.weight.sum(), 0]
    assert not found.variance[1].any()
    assert not found.means[1].any()
    if gradients:
        assert np.isfinite(found.metrics).all()
        assert np.linalg.eigvalsh(found.metrics[1]).min() > 0


def test_a_single_token_has_its_mean_and_no_variance(layer):
    members = np.where(np.arange(ROWS) == 4, 1, 0)
    found = known_of(layer, members)
    np.testing.assert_array_equal(found.means[1], layer.sample.hidden[4])
    assert found.variance[1].max() < 1e-12


def test_a_constant_neuron_never_has_negative_variance(layer):
    layer.sample.hidden[:, 0] = 1000.1
    found = known_of(layer)
    assert (found.variance >= 0).all()
    assert (found.variance[:, 0] < 1e-6).all()


def test_some_experts_can_be_taken_out(layer):
    found = known_of(layer, gradients=True)
    some = found.of(np.array([True, False, True]))
    for name, values in vars(some).items():
        np.testing.assert_array_equal(values, getattr(found, name)[[0, 2]])
    assert known_of(layer).of(np.array([1])).metrics is None


# Of many layers, in a store


def made_of(layer, root, config=quick):
    other = replace(layer, site=replace(layer.site, name="other", index=1))
    assignments = {
        "mlp": assigned(MEMBERS, dim=DIM),
        "other": assigned(np.zeros(ROWS, int), dim=DIM, prefix=(0,), experts=2),
    }
    return Made([layer, other], root, config().resolved(), CUTS), assignments


@pytest.mark.parametrize(("config", "graded"), [(quick, False), (best, True)])
def test_all_layers_are_gathered_in_one_pass(layer, tmp_path, config, graded):
    made, assignments = made_of(layer, tmp_path, config)
    found = gathered(made, assignments)
    assert len(made.reads) == 1
    for name, known in found.items():
        tally = ExpertTally(layer.site, assignments[name], graded)
        alone = statistics_of(tally, summed_alone(tally, layer))
        for field, values in vars(alone).items():
            if values is None:
                assert getattr(known, field) is None
            else:
                np.testing.assert_allclose(
                    getattr(known, field), values, rtol=1e-5, atol=1e-9, err_msg=field
                )
    assert found["other"].weight[2] == 0  # experts without tokens keep their place


def test_what_was_gathered_is_found_again(layer, tmp_path):
    made, assignments = made_of(layer, tmp_path, best)
    first, again = gathered(made, assignments), gathered(made, assignments)
    assert len(made.reads) == 1
    for name, known in first.items():
        for field, values in vars(known).items():
            np.testing.assert_array_equal(getattr(again[name], field), values)


@pytest.mark.parametrize("change", ["tokens", "members", "metric", "layer"])
def test_what_decides_the_statistics_decides_where_they_are_kept(layer, tmp_path, change):
    made, assignments = made_of(layer, tmp_path)
    gathered(made, {"mlp": assignments["mlp"]})
    if change == "tokens":
        made.key = "others"
    if change == "metric":
        made.config = best().resolved()
    members = MEMBERS[::-1] if change == "members" else MEMBERS
    name = "other" if change == "layer" else "mlp"
    gathered(made, {name: assigned(members, dim=DIM)})
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_to_gather_is_no_pass(layer, tmp_path):
    made, _ = made_of(layer, tmp_path)
    assert gathered(made, {}) == {}
    assert made.reads == []
