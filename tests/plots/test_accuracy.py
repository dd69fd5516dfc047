import math

import pandas as pd
import pytest

from moee_analysis import plots
from moee_analysis.plots import style
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, titles, words

COMPARED = ["retention", "retention_low", "retention_high", "agreement", "kl", "reference_top1"]


def own_lines(ax):
    return {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}


def test_a_dot_and_an_interval_for_every_system():
    left, right = figure_of("accuracy").axes
    assert words(left.get_yticklabels()) == ["dense", "MoEE", "random"]
    *dots, intervals = left.collections
    assert [tuple(dot.get_offsets()[0]) for dot in dots] == [(90, 0), (45, 1), (9, 2)]
    assert intervals.get_segments()[1][:, 0] == pytest.approx([36, 54])
    assert left.get_ylim() == (2.5, -0.5)
    assert right.collections[-1].get_offsets()[:, 0].tolist() == [100, 60, 10]
    assert legend(right) == ["retention", "agreement"]
    assert "%" in left.get_xlabel()


def test_without_a_reference_there_is_one_panel_and_top_1_alone():
    alone = TABLES["accuracy"].assign(**dict.fromkeys(COMPARED, math.nan))
    assert len(plots.accuracy(alone).axes) == 1
    said = "Top-1 is: dense 90.0 %, MoEE 45.0 % and random 9.0 %."
    assert plots.describe(plots.accuracy, alone) == said


def test_a_panel_for_each_family_with_its_own_systems_named():
    axes = figure_of("comparison").axes
    assert titles(axes) == ["MoEE", "static pruning", "Upcycling"]
    named = [["best", "paper"], ["pruned"], ["sparse (cannot reduce MACs)"]]
    assert [legend(ax) for ax in axes] == named
    assert legend(figure_of("comparison"))[-1] == "dense model"


def test_points_are_percent_of_all_seeds_and_the_frontier_is_the_most_that_is_kept():
    ax = figure_of("comparison").axes[0]
    best = own_lines(ax)["best"]
    assert best.get_ydata() == pytest.approx([98, 78])
    assert best.get_xdata() == pytest.approx([29 - 0.45, 36 - 0.45])
    front = next(line for line in ax.lines if line.get_linestyle() == ":").get_xydata()
    assert front.tolist() == [[0, 100], pytest.approx([29, 98]), pytest.approx([36, 78])]
    assert [line.get_color() for line in ax.lines].count(style.PALE) == 2
    ends = [segment[:, 1] for segment in ax.collections[0].get_segments()]
    assert ends == [pytest.approx([78.4, 117.6]), pytest.approx([62.4, 93.6])]
    twice = pd.concat([TABLES["comparison"], TABLES["comparison"].assign(seed=2)])
    assert len(own_lines(plots.comparison(twice).axes[0])["best"].get_xdata()) == 2


def test_controls_of_routed_systems_beside_static_pruning():
    axes = figure_of("routing_controls").axes
    assert titles(axes) == ["asked for −28 % MACs", "asked for −36 % MACs"]
    assert words(axes[0].get_yticklabels()) == ["MoEE, best", "MoEE, paper"]
    drawn = {name: list(line.get_xdata()) for name, line in own_lines(axes[0]).items()}
    assert drawn["random routing"] == pytest.approx([80, 90])
    assert drawn["best static pruning"] == pytest.approx([90, 90])
    assert math.isnan(drawn["oracle routing"][1])
    assert legend(figure_of("routing_controls")) == list(drawn)
    none = TABLES["routing_controls"].assign(random_routing=math.nan)
    assert plots.describe(plots.routing_controls, none).startswith("No system has a router")


def test_macs_are_bars_with_outlines_and_totals():
    left, right = figure_of("macs").axes
    table = TABLES["macs"].query("layer >= 0")
    for ax, column in ((left, "macs"), (right, "params")):
        heights = [bar.get_height() for bar in ax.patches if not bar.get_hatch()]
        assert heights == pytest.approx([*table[column] / 1e6, *table[f"{column}_dense"] / 1e6])
    hatched = [(bar.get_y(), bar.get_height()) for bar in left.patches if bar.get_hatch()]
    assert hatched == [(250, 50), (200, 100)]  # now and dense
    assert not any(bar.get_hatch() for bar in right.patches)
    assert left.patches[1].get_facecolor()[3] == 0.35  # stayed dense
    assert titles([left, right]) == [
        "MACs: 1.000 → 0.800 G (−20.0 %)", "parameters: 5.000 → 5.050 M (+1.0 %)"
    ]  # fmt: skip
    assert "Hatched" in figure_of("macs").texts[-1].get_text()


def test_architectures_have_a_panel_for_each_quantity_and_a_line_for_each_model():
    axes = figure_of("architectures").axes
    assert titles(axes) == ["experts", "class explains (% of entropy)", "cosine of mean inputs"]
    assert lines(axes[0]) == [[[20, 4], [80, 9]], [[50, 7]]]
    assert lines(axes[1]) == [
        [pytest.approx([20, 1]), pytest.approx([80, 20])],
        [pytest.approx([20, 0.2]), pytest.approx([80, 0.3])],
    ]
    assert [line.get_linestyle() for line in axes[1].lines if len(line.get_xdata())] == ["-", ":"]
    assert legend(figure_of("architectures")) == ["ViT", "Swin"]


def test_variants_stand_beside_each_other_with_intervals():
    (ax,) = figure_of("architecture_variants").axes
    best, random = own_lines(ax).values()
    assert (best.get_ydata()[0], random.get_ydata()[0]) == pytest.approx((99, 80))
    assert best.get_xdata()[0] < random.get_xdata()[0]
    ends = [bars.get_segments()[0][:, 1] for bars in ax.collections]
    assert ends == [pytest.approx([79.2, 118.8]), pytest.approx([64, 96])]
