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
    left, right = plots.history(history, caption="of a test").axes
    assert [list(p) for p in zip(history["epoch"], history["kl"], strict=True)] in drawn(left)
    assert [[2, 0.2]] in drawn(left)
    assert [[2, 90]] in drawn(right)
    assert [[1, 0.4], [2, 0.3], [3, 0.2]] in drawn(left)
    assert "nats" in left.get_ylabel()


def test_every_system_has_a_line(history):
    both = pd.concat([history.assign(system="MoEE"), history.assign(system="static")])
    left, _ = plots.history(both).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["MoEE", "static"]


@pytest.fixture
def table():
    rows = []
    for system, lost in {"MoEE": 0.02, "static pruning": 0.04}.items():
        for budget, saved in enumerate((0.28, 0.36)):
            for stage, seeds in {"before": (0,), "after": (0, 1, 2)}.items():
                mean = 1 - lost * (budget + 1) / (2 if stage == "after" else 1)
                rows += [
                    {
                        "system": system, "budget": budget, "stage": stage, "seed": seed,
                        "retention": mean + 0.001 * seed, "mean": mean, "low": mean - 0.01,
                        "high": mean + 0.01, "macs_reduction": saved + 0.001 * seed,
                    }
                    for seed in seeds
                ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_line_for_every_system_before_and_after(table):
    (ax,) = plots.fine_tuning(table).axes
    lines = [line for line in ax.lines if line.get_marker() in "os"]
    assert [100 * v for v in (0.98, 0.96)] == pytest.approx(list(lines[0].get_ydata()))
    assert [line.get_linestyle() for line in lines] == ["--", "-", "--", "-"]
    assert [len(line.get_xdata()) for line in lines] == [2] * 4
    seeds = [line for line in ax.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in seeds] == [6, 6]
    assert len(ax.collections) == 4


def test_systems_and_stages_are_named(table):
    (legend,) = plots.fine_tuning(table).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "MoEE", "static pruning", "before fine-tuning", "after fine-tuning", "dense model",
    ]  # fmt: skip
