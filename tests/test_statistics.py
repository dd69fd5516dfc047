from __future__ import annotations

import numpy as np
import pytest

from moee_analysis import statistics
from moee_analysis.activations import LayerSample
from moee_analysis.statistics import statistics_of

ROWS, DIM, HIDDEN, EXPERTS = 60, 5, 7, 3
RECORDED = ("inputs", "hidden", "image", "position", "weight")


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    sample = LayerSample(
        inputs=rng.normal(size=(ROWS, DIM)).astype(np.float16),
        hidden=rng.normal(2, 1, size=(ROWS, HIDDEN)).astype(np.float16),
        image=np.zeros(ROWS, np.int32),
        position=np.zeros(ROWS, np.int32),
        weight=rng.integers(1, 4, size=ROWS).astype(np.float32),
    )
    return sample, rng.integers(-1, EXPERTS, size=ROWS)


def counted_one_by_one(sample, expert, chosen):
    """Weight, mean input, means and variances of one expert, token by token."""
    rows = [
        row for row in range(ROWS) if expert[row] == chosen for _ in range(int(sample.weight[row]))
    ]
    hidden = [[float(v) for v in sample.hidden[row]] for row in rows]
    means = [sum(column) / len(rows) for column in zip(*hidden, strict=True)]
    variances = [
        sum((v - m) ** 2 for v in column) / len(rows)
        for column, m in zip(zip(*hidden, strict=True), means, strict=True)
    ]
    inputs = np.mean([sample.inputs[row].astype(float) for row in rows], axis=0)
    return len(rows), inputs, means, variances


def test_statistics_equal_a_slow_loop_that_repeats_each_token_by_its_weight(drawn, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 16)
    sample, expert = drawn
    found = statistics_of(sample, lambda rows: expert[rows], experts=EXPERTS)
    for chosen in range(EXPERTS):
        weight, inputs, means, variances = counted_one_by_one(sample, expert, chosen)
        assert found.weight[chosen] == weight
        np.testing.assert_allclose(found.mean_input[chosen], inputs, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.mean_hidden[chosen], means, rtol=1e-10)
        np.testing.assert_allclose(found.variance[chosen], variances, rtol=1e-10)


def test_shares_leave_noise_out_and_sum_to_1(drawn):
    sample, expert = drawn
    found = statistics_of(sample, lambda rows: expert[rows], experts=EXPERTS)
    weights = [sample.weight[expert == e].sum() for e in range(EXPERTS)]
    np.testing.assert_allclose(found.shares, np.array(weights) / sum(weights), rtol=1e-6)


@pytest.mark.parametrize("cut", [1, 23, 59])
def test_two_parts_add_up_to_one_pass(drawn, cut):
    sample, expert = drawn
    parts = [
        LayerSample(*(getattr(sample, name)[rows] for name in RECORDED))
        for rows in (slice(cut), slice(cut, None))
    ]
    labels = [expert[:cut], expert[cut:]]
    one, other = (
        statistics_of(part, lambda rows, own=own: own[rows], experts=EXPERTS)
        for part, own in zip(parts, labels, strict=True)
    )
    whole = statistics_of(sample, lambda rows: expert[rows], experts=EXPERTS)
    for name in ("weight", "inputs", "hidden", "squares"):
        np.testing.assert_allclose(getattr(one + other, name), getattr(whole, name), rtol=1e-12)


def test_an_expert_without_tokens_has_no_variance_and_no_share(drawn):
    sample, _ = drawn
    found = statistics_of(sample, lambda rows: np.zeros(ROWS, int)[rows], experts=2)
    assert found.shares.tolist() == [1, 0]
    assert not found.variance[1].any()
    assert not found.mean_hidden[1].any()


def test_a_constant_neuron_never_has_negative_variance(drawn):
    sample, expert = drawn
    sample.hidden[:, 0] = 1000.1
    found = statistics_of(sample, lambda rows: expert[rows], experts=EXPERTS)
    assert (found.variance >= 0).all()
    assert (found.variance[:, 0] < 1e-6).all()
