import math

import numpy as np
import pytest

from moee_analysis import plots
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, panel, titles


def caption(fig):
    return " ".join(fig.texts[-1].get_text().split())


def test_a_panel_for_every_layer_and_steps_of_area_one():
    fig = figure_of("routing")
    assert titles(fig.axes) == ["layer 0", "layer 1"]
    assert fig.axes[0].patches[0].get_data().values == pytest.approx([1.4, 0.6])
    for steps in [patch for ax in fig.axes for patch in ax.patches]:
        heights, edges, _ = steps.get_data()
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
        assert (np.diff(heights) <= 0).all()
    told = "24 images. MoEE: 1 to 2 experts, k = 1; random centres: 2 experts, k = 2."
    assert caption(fig) == told
    assert legend(fig) == ["MoEE", "random centres"]
    assert legend(plots.routing(TABLES["routing"].query("system == 'MoEE'"))) == []


def test_balance_draws_every_metric_against_the_layers_with_bands():
    fig = figure_of("balance")
    assert lines(panel(fig, "Gini")) == [[[0, 0.2], [1, 0.4]], [[0, 0.3], [1, 0.3]]]
    assert len(panel(fig, "Gini").collections) == 2
    assert panel(fig, "normalised entropy").get_ylim()[1] > 1
    assert legend(fig) == ["MoEE", "random centres"]
    assert "95 %" in caption(fig)
    without = plots.balance(TABLES["balance"].assign(low=math.nan, high=math.nan))
    assert "95 %" not in caption(without)
    assert not panel(without, "Gini").collections


def test_an_unknown_metric_is_shown_and_described_by_its_own_name():
    table = TABLES["balance"].query("metric == 'gini'").assign(metric="spread")
    assert titles(plots.balance(table).axes) == ["spread"]
    assert plots.describe(plots.balance, table).startswith("spread over the layers: MoEE 0.20")


def test_regret_draws_every_router_left_and_all_but_the_oracle_right():
    fig = figure_of("router_regret")
    left, right = fig.axes
    assert legend(fig) == ["centre", "oracle"]
    assert lines(left) == [[[0, 2], [1, 4]], [[0, 1], [1, 1]]]
    assert lines(right) == [[[0, 1], [1, 1]]]
    looks = [(line.get_color(), line.get_marker()) for line in (*left.lines[:2], right.lines[0])]
    assert looks[0] == looks[2] != looks[1]
    assert "%" in left.get_ylabel()
    assert "regret" in right.get_title(loc="left")
    assert "layer" in fig.get_supxlabel()
