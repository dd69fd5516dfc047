from __future__ import annotations

import pytest

from moee_analysis.baselines.common.capacity import ExpertCost, per_expert, saving
from moee_analysis.errors import MoeeError

ALIKE = [ExpertCost(10, 20)] * 3
UNLIKE = [ExpertCost(3, 64), ExpertCost(12, 16)]


@pytest.mark.parametrize(("tokens", "experts", "capacity", "expected"), [
    (197, 32, 2.0, 12), (197, 8, 1.0, 25), (10, 4, 0.01, 1), (10, 4, 4.0, 10),
])  # fmt: skip
def test_per_expert(tokens, experts, capacity, expected):
    assert per_expert(tokens, experts, capacity) == expected


@pytest.mark.parametrize("layers", [ALIKE, UNLIKE])
@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_budgets_are_met_to_within_one_step(layers, reduction):
    counts = saving(reduction, layers, dense=1000, fixed=150)
    spent = 150 + sum(n * layer.each for n, layer in zip(counts, layers, strict=True))
    assert spent <= (1 - reduction) * 1000
    full = all(n == layer.tokens for n, layer in zip(counts, layers, strict=True))
    assert full or spent + max(layer.each for layer in layers) > (1 - reduction) * 1000


def test_equal_layers_grow_in_turn():
    assert saving(0.5, ALIKE, dense=1000, fixed=150) == [12, 12, 11]


def test_unequal_layers_have_the_same_share_of_tokens():
    few, many = saving(0.5, UNLIKE, dense=1000, fixed=200)[::-1]
    assert many / 64 == pytest.approx(few / 16, abs=1 / 16)


def test_no_more_than_all_tokens():
    assert saving(0.01, ALIKE, dense=10_000, fixed=0) == [20, 20, 20]


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(MoeeError, match=r"at most 82.0%; found 85.0%"):
        saving(0.85, ALIKE, dense=1000, fixed=150)
