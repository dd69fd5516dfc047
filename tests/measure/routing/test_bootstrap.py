import numpy as np

from moee_analysis.measure.routing.bootstrap import Groups, against_chance, basic_interval


def test_redrawn_images_stay_in_their_class_and_shuffled_ones_are_used_once():
    labels, rng = np.array([7, 2, 7, 2, 2, 9]), np.random.default_rng(1)
    groups = Groups(labels)
    for _ in range(20):
        assert (labels[groups.resample(rng)] == labels[groups.order]).all()
        partners = groups.exchange(rng)
        assert (labels[partners] == labels).all()
        assert sorted(partners) == sorted(groups.shuffle(rng)) == list(range(6))
    drawn = np.concatenate([Groups(np.zeros(5, int)).resample(rng) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 0.2, atol=0.01)


def test_the_basic_interval_turns_the_quantiles_round_and_p_is_never_zero():
    ends = basic_interval(np.array(10.0), np.arange(9, 14, 0.01))
    np.testing.assert_allclose(ends, (20 - 13.86, 20 - 9.12), atol=0.02)
    assert basic_interval(np.array(0.1), np.array([0.3, 0.4]))[0] == 0
    found = against_chance(np.array(3.0), np.array([1.0, 2.0, 3.0]))
    assert (found["p"], found["excess"]) == (2 / 4, 1)
    assert against_chance(np.array(9.0), np.zeros(99))["p"] == 1 / 100
