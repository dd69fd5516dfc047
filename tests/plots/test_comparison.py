from __future__ import annotations

import math

import pandas as pd
import pytest

from moee_analysis import plots

KEPT = {
    ("MoEE", "MoEE, best"): 0.98, ("static pruning", "static: magnitude"): 0.5,
    ("static pruning", "static: least squares"): 0.9, ("Sparse Upcycling", "top-1"): 1.0,
}  # fmt: skip


def row(family, system, asked, kept):
    routed, saves = family != "static pruning", system != "top-1"
    return {
        "system": system, "family": family, "macs_asked": asked, "seed": 0,
        "mean": kept - (asked if saves else 0), "low": kept - asked - 0.05, "high": kept,
        "macs_reduction": asked if saves else -0.001, "reduces_macs": saves,
        "random_routing": kept / 2 if routed else math.nan,
        "constant_routing": kept / 3 if routed else math.nan,
        "oracle_routing": kept if family == "MoEE" else math.nan, "static_pruning": 0.9 - asked,
    }  # fmt: skip


@pytest.fixture
def table():
    rows = [row(*who, asked, kept) for who, kept in KEPT.items() for asked in (0.2, 0.3)]
    unmade = row("MoEE", "MoEE, too small", 0.3, 0.5) | dict.fromkeys(
        ("mean", "low", "high", "macs_reduction"), math.nan
    )
    return pd.DataFrame([*rows, unmade])


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_panel_for_each_family_with_its_own_systems_named(table):
    fig = plots.comparison(table, caption="of a test")
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        "MoEE", "static pruning", "Sparse Upcycling",
    ]  # fmt: skip
    assert labels(fig.axes[0]) == ["best"]
    assert labels(fig.axes[1]) == ["magnitude", "least squares"]
    assert labels(fig.axes[2]) == ["top-1 (cannot reduce MACs)"]


def test_points_are_percent_and_the_frontier_is_the_most_that_is_kept(table):
    ax = plots.comparison(table).axes[0]
    own = next(line for line in ax.lines if line.get_label() == "best")
    assert own.get_xydata().tolist() == [pytest.approx([20, 78]), pytest.approx([30, 68])]
    front = next(line for line in ax.lines if line.get_linestyle() == ":").get_xydata()
    assert front.tolist() == [[0, 100], pytest.approx([20, 78]), pytest.approx([30, 68])]


def test_seeds_are_one_point(table):
    twice = pd.concat([table, table.assign(seed=1)])
    own = next(line for line in plots.comparison(twice).axes[0].lines if line.get_label() == "best")
    assert len(own.get_xdata()) == 2


def test_controls_of_routed_systems_beside_static_pruning(table):
    axes = plots.routing_controls(table).axes
    assert [ax.get_title(loc="left") for ax in axes] == [
        "asked for −20 % MACs", "asked for −30 % MACs",
    ]  # fmt: skip
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["MoEE, best", "top-1"]
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes[0].lines}
    assert drawn["random routing"] == pytest.approx([49, 50])
    assert drawn["best static pruning"] == pytest.approx([70, 70])
    assert math.isnan(drawn["oracle routing"][1])
