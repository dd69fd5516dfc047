from __future__ import annotations

import math

import pandas as pd
import pytest

from moee_analysis import plots


@pytest.fixture
def history():
    return pd.DataFrame(
        {
            "epoch": [0, 1, 2, 3], "steps": [0, 5, 10, 15], "loss": [math.nan, 0.4, 0.3, 0.2],
            "kl": [0.5, 0.3, 0.2, 0.25], "agreement": [0.8, 0.85, 0.9, 0.88],
        }
    )  # fmt: skip


def drawn(ax):
    return [line.get_xydata().tolist() for line in ax.lines]


def test_both_curves_begin_before_training_and_the_kept_epoch_has_a_ring(history):
    left, right = plots.fine_tuning(history, caption="of a test").axes
    assert [list(p) for p in zip(history["epoch"], history["kl"], strict=True)] in drawn(left)
    assert [[2, 0.2]] in drawn(left)
    assert [[2, 90]] in drawn(right)
    assert [[1, 0.4], [2, 0.3], [3, 0.2]] in drawn(left)
    assert "nats" in left.get_ylabel()


def test_every_system_has_a_line(history):
    both = pd.concat([history.assign(system="MoEE"), history.assign(system="static")])
    left, _ = plots.fine_tuning(both).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["MoEE", "static"]
