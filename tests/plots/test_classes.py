import math

import pytest

from moee_analysis import plots
from moee_analysis.plots import style
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, titles, words


def shown(ax):
    return ax.collections[0].get_array().tolist()


def test_class_routing_orders_experts_by_their_use():
    fig = figure_of("class_routing")
    assert titles(fig.axes[:2]) == ["pug", "plane"]
    assert [ax.get_ylabel() for ax in fig.axes[::2]] == ["layer 3", "layer 9"]
    heights = [[bar.get_height() for bar in bars] for bars in fig.axes[0].containers]
    assert heights == [[0.8, 0.2], [0.7, 0.3]]  # all classes, the class
    assert words(fig.axes[0].get_xticklabels()) == ["1", "0"]
    assert legend(fig) == ["all classes", "the class"]


def test_specificity_draws_a_line_per_class_the_mean_and_its_bands():
    ax = figure_of("specificity").axes[0]
    pug, cat, mean, corrected = lines(ax)
    assert sorted((pug[1][1], cat[1][1])) == [0.2, 0.9]
    assert mean == [[0, 0.02], [5, 0.3]]
    assert corrected == [[0, 0.01], [5, 0.25]]
    assert len(ax.collections) == 2
    assert sorted(words(ax.texts)) == ["cat", "pug"]
    assert legend(figure_of("specificity"))[1:] == ["mean over classes", "bias removed, 95 %"]
    alone = TABLES["specificity"].query("class_name == 'all'")
    assert len(lines(plots.specificity(alone).axes[0])) == 2


def test_information_no_more_than_chance_has_a_hollow_mark():
    ax = figure_of("class_information").axes[0]
    assert lines(ax) == [[[0, 0.01], [5, 0.123]], [[0, 0.01]]]
    assert ax.lines[-1].get_markerfacecolor() == "white"
    assert len(ax.collections) == 1
    assert legend(figure_of("class_information"))[-1] == "no more than permuted labels"


def test_class_distance_names_classes_in_order_and_parts_families():
    ax = figure_of("class_distance").axes[0]
    assert words(ax.get_yticklabels()) == words(ax.get_xticklabels()) == ["pug", "cat", "cliff"]
    assert shown(ax)[0] == [0, 0.05, 0.6]
    assert [line.get_ydata()[0] for line in ax.lines[::2]] == [2]
    alone = plots.class_distance(TABLES["class_distance"].drop(columns=["family_a", "family_b"]))
    assert not alone.axes[0].lines


@pytest.mark.parametrize(
    ("name", "chance", "intervals"),
    [("class_relatedness", ["--"], 0), ("modularity", ["--", ":"], 1)],
)
def test_relatedness_and_modularity_have_a_line_per_system_and_chance_below(
    name, chance, intervals
):
    ax = figure_of(name).axes[0]
    own, *nulls = [line for line in ax.lines if len(line.get_xdata()) == 2][: 1 + len(chance)]
    assert (own.get_color(), own.get_ydata()[1]) == (style.PALETTE[0], 0.4)
    assert [line.get_linestyle() for line in nulls] == chance
    assert len(legend(figure_of(name))) == 1 + len(chance)
    assert len(ax.collections) == intervals


def test_part_profile_shows_all_patches_first_and_the_parts_asked_for():
    ax = figure_of("part_profile").axes[0]
    assert words(ax.get_yticklabels()) == ["all", "1 (30%)", "0 (10%)"]
    assert words(ax.get_xticklabels()) == ["sky", "wheel"]
    assert shown(ax) == [[0.4, 0.2], [0.5, 0.5], [0.9, 0]]
    few = plots.part_profile(TABLES["part_profile"], parts=1).axes[0]
    assert words(few.get_xticklabels()) == ["sky"]


def test_a_dot_is_an_expert_beside_its_control():
    removed, alone = figure_of("knock_out").axes
    expert, control, dense, intact = removed.lines
    assert expert.get_ydata() == pytest.approx([73, 71, 71, 69, 67])
    assert control.get_ydata() == pytest.approx([74, 73, 73, 72, 71])
    assert (control.get_xdata() > expert.get_xdata()).all()
    assert (dense.get_ydata()[0], intact.get_ydata()[0]) == (90, 75)
    assert alone.get_title(loc="left") == "one expert alone"
    names = ["dense", "intact", "expert", "as many random tokens"]
    assert legend(figure_of("knock_out")) == names


def test_classes_stand_by_family_and_experts_by_their_tokens():
    ax, other = figure_of("class_knock_out").axes[:2]
    assert words(ax.get_yticklabels()) == ["green", "red one", "blue"]
    assert words(other.get_xticklabels()) == ["2", "1", "0"]
    assert not other.get_yticklabels()
    assert shown(ax)[0] == pytest.approx([-0.08, -0.04])
    assert [line.get_ydata()[0] for line in ax.lines] == [1]


def test_use_and_need_have_chance_levels():
    left, right = figure_of("use_and_need").axes
    assert lines(left)[:2] == [[[0, 0.5], [4, 0.05]], [[0, 0.1], [4, 0.1]]]
    assert lines(right)[2:] == [[[0, 0.3], [4, 0.1]], [[0, 0.2], [4, 0.2]]]
    names = ["expert", "as many random tokens", "permuted classes, 95 %"]
    assert legend(figure_of("use_and_need")) == names


def test_changes_of_recall_are_in_points_and_clear_ones_have_a_dot():
    axes = figure_of("parts_unseen").axes
    assert words(axes[0].get_yticklabels()) == ["sky (90%)", "wheel (50%)"]
    assert shown(axes[0]) == [[-40, 2], [0, -10]]
    assert lines(axes[0]) == [[[0.5, 0.5], [1.5, 1.5]]]
    assert titles(axes[:2]) == ["layer 1, expert", "layer 1, random patches"]


@pytest.mark.parametrize(
    "name", ["parts_unseen", "class_knock_out", "knock_out", "which_beats_which"]
)
def test_numbers_that_are_not_known_leave_a_figure_all_the_same(name):
    table = TABLES[name].copy()
    table[table.select_dtypes("float").columns] = math.nan
    getattr(plots, name)(table).draw_without_rendering()
