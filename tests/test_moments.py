from __future__ import annotations

import numpy as np
import pytest

from moee_analysis import moments
from moee_analysis.moments import moments_of
from tests.makers import sample_of

ROWS, HIDDEN = 90, 7


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    hidden = (rng.normal(size=(ROWS, HIDDEN)) @ rng.normal(size=(HIDDEN, HIDDEN))).astype("f2")
    return sample_of(hidden, weight=rng.integers(1, 5, size=ROWS).astype("f4"))


def expected(sample, rows):
    """Weight, mean and covariance, every row repeated as often as its weight says."""
    hidden = np.repeat(sample.hidden[rows].astype("f8"), sample.weight[rows].astype(int), axis=0)
    return len(hidden), hidden.mean(axis=0), np.cov(hidden.T, bias=True)


def agree(found, wanted, *, rtol=1e-5):
    weight, mean, covariance = wanted
    assert found.weight == weight
    np.testing.assert_allclose(found.mean, mean, rtol=rtol, atol=rtol)
    largest = covariance.max()
    np.testing.assert_allclose(found.covariance, covariance, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("rows", [np.arange(ROWS), np.array([2, 3, 50, 71, 88]), np.arange(40, 90)])
def test_moments_count_every_token_as_often_as_it_stands_for(drawn, rows):
    agree(moments_of(drawn, rows), expected(drawn, rows))


@pytest.mark.parametrize("chunk", [1, 7, 89, 90])
def test_chunks_add_up_to_one_pass(drawn, monkeypatch, chunk):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    rows = np.arange(ROWS)
    agree(moments_of(drawn, rows), expected(drawn, rows))


@pytest.mark.parametrize("chunk", [20, 90])
def test_a_large_common_mean_costs_no_precision(drawn, monkeypatch, chunk):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    far = sample_of(drawn.hidden.astype("f4") + 3000, weight=drawn.weight)
    rows = np.arange(ROWS)
    found = moments_of(far, rows)
    np.testing.assert_allclose(found.covariance, expected(drawn, rows)[2], atol=2e-3)
    agree(found, expected(far, rows))


def test_a_covariance_is_symmetric_and_never_negative(drawn):
    covariance = moments_of(drawn, np.arange(ROWS)).covariance.double()
    np.testing.assert_allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6)
    assert np.linalg.eigvalsh(covariance).min() > -1e-6


def test_a_single_token_has_its_mean_and_no_covariance(drawn):
    found = moments_of(drawn, np.array([4]))
    np.testing.assert_array_equal(found.mean, drawn.hidden[4].astype("f4"))
    assert not found.covariance.any()


def test_no_tokens_have_no_moments(drawn):
    found = moments_of(drawn, np.array([], dtype=int))
    assert found.weight == 0
    assert found.covariance.shape == (HIDDEN, HIDDEN)
    assert not found.mean.any()
    assert not found.covariance.any()
