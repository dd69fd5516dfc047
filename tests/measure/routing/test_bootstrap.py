import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import Groups, against_chance, basic_interval, repeat

LABELS = np.array([7, 2, 7, 2, 2, 9])


def test_means_equal_a_loop_over_classes():
    values = np.random.default_rng(0).normal(size=(6, 3))
    groups = Groups.of(LABELS)
    expected = [values[c == LABELS].mean(axis=0) for c in (2, 7, 9)]
    np.testing.assert_allclose(groups.means(values), expected)
    assert groups.classes.tolist() == [2, 7, 9]
    assert groups.sizes.tolist() == [3, 2, 1]


def test_a_resample_stays_within_the_class():
    groups, rng = Groups.of(LABELS), np.random.default_rng(1)
    for _ in range(20):
        drawn = LABELS[groups.resampled(rng)]
        assert drawn.tolist() == LABELS[groups.order].tolist()


def test_every_image_of_a_class_is_drawn_equally_often():
    groups, rng = Groups.of(np.zeros(5, dtype=int)), np.random.default_rng(2)
    drawn = np.concatenate([groups.resampled(rng) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 0.2, atol=0.01)


def test_a_permutation_uses_every_image_once():
    groups, rng = Groups.of(LABELS), np.random.default_rng(3)
    assert sorted(groups.shuffled(rng)) == list(range(6))


def test_exchanged_images_are_of_the_same_class():
    groups, rng = Groups.of(LABELS), np.random.default_rng(4)
    for _ in range(20):
        partners = groups.exchanged(rng)
        assert sorted(partners) == list(range(6))
        assert (LABELS[partners] == LABELS).all()


def test_the_basic_interval_turns_the_quantiles_round():
    low, high = basic_interval(np.array(10.0), np.arange(9, 14, 0.01))
    assert low == pytest.approx(20 - 13.86, abs=0.02)
    assert high == pytest.approx(20 - 9.12, abs=0.02)
    assert basic_interval(np.array(0.1), np.array([0.3, 0.4]))[0] == 0


def test_p_is_never_zero_and_counts_ties():
    found = against_chance(np.array(3.0), np.array([1.0, 2.0, 3.0]))
    assert found["p"] == 2 / 4
    assert against_chance(np.array(9.0), np.zeros(99))["p"] == 1 / 100
    assert found["excess"] == 1


def test_nothing_to_repeat_is_refused():
    with pytest.raises(MoeeError, match="permutations or resamples as a whole number"):
        repeat(lambda x: x, lambda rng: rng.random(), times=0, seed=0)
