import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.colours import BLACK, colour_model, coloured_images

CLASSES, EXPERTS = 6, 5
USE, NEED, *OTHERS = (
    np.random.default_rng(seed).dirichlet(np.ones(EXPERTS), size=CLASSES) for seed in range(60)
)


def made(need, use=USE, *, random=0.0):
    """A table of knock-outs of one layer: by class and expert the use, and what is lost."""
    lost = {("removed", "expert"): need, ("removed", "random tokens"): random + 0 * need}
    rows = [
        {
            "layer": 2, "expert": e, "what": what, "system": system, "kind": "class",
            "group": f"class {c}", "knocked_out": use[c, e],
            "logp_change": -lost.get((what, system), 0 * need)[c, e],
        }
        for c, e in np.ndindex(need.shape)
        for what, system in itertools.product(("removed", "alone"), ("expert", "random tokens"))
    ]  # fmt: skip
    everything = {**rows[0], "kind": "all", "group": "all", "logp_change": 99.0}
    return pd.DataFrame([*rows, everything])


def found(table, system="expert"):
    return measure.use_and_need(table, permutations=200).set_index("system").loc[system]


def test_classes_that_need_what_they_use_correlate_beyond_chance():
    row = found(made(3 * USE))
    assert row["spearman"] == pytest.approx(1)
    assert row["null_high"] < 0.9
    assert row["p"] == pytest.approx(1 / 201)
    assert (row["top_match"], row["top_match_even"]) == (1, 1 / EXPERTS)
    assert (row["classes"], row["experts"]) == (CLASSES, EXPERTS)
    pairs = measure.uses_and_needs(made(3 * USE))
    assert len(pairs) == 3 * CLASSES * EXPERTS
    one = pairs[(pairs["system"] == "expert") & (pairs["expert"] == 1)]
    np.testing.assert_allclose(one["use"], USE[:, 1] - USE[:, 1].mean())
    np.testing.assert_allclose(one["need"], 3 * one["use"])


def test_it_is_the_rank_correlation_of_the_excess_over_other_classes():
    expected = spearmanr((USE - USE.mean(axis=0)).ravel(), (NEED - NEED.mean(axis=0)).ravel())
    for need in (NEED, NEED + np.arange(EXPERTS)):  # an expert that all need is no class's own
        assert found(made(need))["spearman"] == pytest.approx(expected.statistic)
    with pytest.raises(MoeeError, match="at least four classes"):
        measure.use_and_need(made(NEED[:3]))


def test_unrelated_use_and_need_are_chance():
    p = [found(made(need, use))["p"] for need, use in zip(OTHERS[::2], OTHERS[1::2], strict=True)]
    assert 0.3 < np.mean(p) < 0.7


def test_random_tokens_that_explain_all_leave_nothing_beyond_them():
    table = made(USE, random=USE)
    assert found(table, "random tokens")["spearman"] == pytest.approx(1)
    beyond = found(table, "beyond random tokens")
    assert (beyond["spearman"], beyond["p"]) == (0, 1)
    half = found(made(USE, random=USE / 2), "beyond random tokens")
    assert half["spearman"] == pytest.approx(1)


def test_experts_that_carry_classes_are_found_in_a_model():
    images, others = coloured_images(*range(12)), coloured_images(*range(100, 104))
    table = measure.knock_out(colour_model(), images, others, resamples=2)
    row = measure.use_and_need(table).set_index("system").loc["beyond random tokens"]
    assert row["spearman"] > row["null_high"]
    assert row["p"] < 0.1  # of four classes there are 24 orders
    assert (row["top_match"], row["experts"]) == (1, BLACK + 1)
