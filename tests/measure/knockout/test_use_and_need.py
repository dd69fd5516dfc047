"""Use and need of experts, from tables of knock-outs that are made up."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from tests.helpers.colours import BLACK, COLOURS, colour_model, coloured_images

CLASSES, EXPERTS = 6, 5


def made(need, use, *, random=None):
    """A table of knock-outs of one layer: by class and expert what is used, and what is lost."""
    random = np.zeros_like(need) if random is None else random
    rows = [
        {
            "layer": 2, "expert": e, "what": what, "system": system, "kind": "class",
            "group": f"class {c}", "knocked_out": use[c, e],
            "logp_change": -(need if system == "expert" else random)[c, e] * (what == "removed"),
        }
        for c, e in itertools.product(range(len(use)), range(EXPERTS))
        for what in ("removed", "alone")
        for system in ("expert", "random tokens")
    ]  # fmt: skip
    everything = {**rows[0], "kind": "all", "group": "all", "logp_change": 99.0}
    return pd.DataFrame([*rows, everything])


def drawn(seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(EXPERTS), size=CLASSES)


def found(table, system="expert"):
    return measure.use_and_need(table, permutations=200).set_index("system").loc[system]


def test_classes_that_need_what_they_use_correlate_beyond_chance():
    use = drawn()
    row = found(made(3 * use, use))
    assert row["spearman"] == pytest.approx(1)
    assert row["null_high"] < 0.9
    assert row["p"] == pytest.approx(1 / 201)
    assert (row["top_match"], row["top_match_even"]) == (1, 1 / EXPERTS)
    assert (row["classes"], row["experts"]) == (CLASSES, EXPERTS)
    pairs = measure.uses_and_needs(made(3 * use, use))
    assert len(pairs) == 3 * CLASSES * EXPERTS
    one = pairs[(pairs["system"] == "expert") & (pairs["expert"] == 1)]
    np.testing.assert_allclose(one["use"], use[:, 1] - use[:, 1].mean())
    np.testing.assert_allclose(one["need"], 3 * one["use"])


def test_it_is_the_rank_correlation_of_what_is_more_than_other_classes():
    use, need = drawn(), drawn(1)
    expected = spearmanr((use - use.mean(axis=0)).ravel(), (need - need.mean(axis=0)).ravel())
    assert found(made(need, use))["spearman"] == pytest.approx(expected.statistic)
    with pytest.raises(MoeeError, match="at least four classes"):
        measure.use_and_need(made(use[:3], need[:3]))
    shifted = made(need + np.arange(EXPERTS), use)  # an expert that all need is no class's own
    assert found(shifted)["spearman"] == pytest.approx(expected.statistic)


def test_unrelated_use_and_need_are_chance():
    p = [found(made(drawn(seed + 100), drawn(seed)))["p"] for seed in range(40)]
    assert 0.3 < np.mean(p) < 0.7


def test_what_random_tokens_explain_is_not_beyond_them():
    use = drawn()
    table = made(use, use, random=use)
    assert found(table, "random tokens")["spearman"] == pytest.approx(1)
    beyond = found(table, "beyond random tokens")
    assert (beyond["spearman"], beyond["p"]) == (0, 1)
    half = found(made(use, use, random=use / 2), "beyond random tokens")
    assert half["spearman"] == pytest.approx(1)


def test_experts_that_carry_classes_are_found_in_a_model():
    images = coloured_images(*range(24))
    table = measure.knock_out(colour_model(), images, coloured_images(*range(100, 112)))
    row = measure.use_and_need(table).set_index("system").loc["beyond random tokens"]
    assert row["spearman"] > row["null_high"]
    assert row["p"] < 0.1  # of four classes there are 24 orders
    assert row["top_match"] == 1
    assert row["experts"] == BLACK + 1 == len(COLOURS) + 1
