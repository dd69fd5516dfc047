from __future__ import annotations

import pytest

from moee_analysis.baselines.common.replace_mlps import fill_budget, per_expert
from moee_analysis.errors import MoeeError

ALIKE = [10, 10, 10], [20, 20, 20]
UNLIKE = [3, 12], [64, 16]


@pytest.mark.parametrize(("tokens", "experts", "capacity", "expected"), [
    (197, 32, 2.0, 12), (197, 8, 1.0, 25), (10, 4, 0.01, 1), (10, 4, 4.0, 10),
])  # fmt: skip
def test_per_expert(tokens, experts, capacity, expected):
    assert per_expert(tokens, experts, capacity) == expected


@pytest.mark.parametrize(("costs", "tokens"), [ALIKE, UNLIKE])
@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_budgets_are_met_to_within_one_step(costs, tokens, reduction):
    counts = fill_budget(reduction, costs, tokens, dense=1000, fixed=150)
    spent = 150 + sum(n * cost for n, cost in zip(counts, costs, strict=True))
    assert spent <= (1 - reduction) * 1000
    assert counts == tokens or spent + max(costs) > (1 - reduction) * 1000


def test_layers_grow_in_turn_by_their_share_of_tokens_up_to_all_of_them():
    assert fill_budget(0.5, *ALIKE, dense=1000, fixed=150) == [12, 12, 11]
    many, few = fill_budget(0.5, *UNLIKE, dense=1000, fixed=200)
    assert many / 64 == pytest.approx(few / 16, abs=1 / 16)
    assert fill_budget(0.01, *ALIKE, dense=10_000, fixed=0) == [20, 20, 20]


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(MoeeError, match=r"at most 82.0%; found 85.0%"):
        fill_budget(0.85, *ALIKE, dense=1000, fixed=150)
