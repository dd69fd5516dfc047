import math

import numpy as np
import pandas as pd
import pytest

from moee_analysis import plots
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, titles, words


def cells(ax):
    return np.ma.filled(ax.collections[0].get_array().astype(float), math.nan)


def test_layers_marks_those_that_stayed_dense():
    left, _, right = figure_of("layers").axes
    (cross,) = [line for line in left.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [0]
    assert [bar.get_height() for bar in left.patches] == [0, 4, 7]
    assert [bar.get_height() for bar in right.patches[4:]] == [0.5, 0.25]
    assert legend(figure_of("layers")) == ["stored", "active"]
    dense = TABLES["layers"].assign(converted=False)
    said = "0 of 3 layers have clusters: all stay dense."
    assert plots.describe(plots.layers, dense) == said


def test_sizes_draws_a_dot_per_expert_beside_each_other():
    ax = figure_of("sizes").axes[0]
    dots = np.asarray(ax.collections[0].get_offsets())
    assert dots[:, 1].tolist() == [0.2, 0.5, 0.4]
    assert dots[:, 0] == pytest.approx([2.85, 3.15, 4])
    assert len(legend(figure_of("sizes"))) == 3
    assert "%" in ax.yaxis.get_major_formatter()(0.5)


def test_neurons_are_cells_by_expert_and_several_systems_are_named():
    fig = figure_of("neurons")
    assert cells(fig.axes[0]).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert titles(fig.axes)[1] == "layer 5: 4 hidden neurons"
    both = pd.concat([TABLES["neurons"], TABLES["neurons"].assign(system="random centres")])
    both = both.reset_index(drop=True)
    assert "in layer 3 of random centres" in plots.describe(plots.neurons, both)
    assert titles(plots.neurons(both).axes)[2] == "random centres\nlayer 3: 4 hidden neurons"


def test_overlap_shows_the_values_found_above_those_expected():
    shown = cells(figure_of("overlap").axes[0])
    assert (shown[0, 1], shown[1, 0]) == (0.5, 0.2)
    assert np.isnan(np.diag(shown)).all()


def test_similarity_shows_both_cosines_in_the_same_order():
    axes = figure_of("similarity").axes[:2]
    assert [cells(ax)[0].tolist() for ax in axes] == [[1, 0.9, 0.5], [1, -0.5, 0.1]]
    assert titles(axes)[1] == "layer 5, centred"
    assert [words(ax.get_xticklabels()) for ax in axes] == [["0", "1", "2"]] * 2


def test_the_summary_has_means_ranges_and_expected_values():
    left, right = figure_of("similarity_summary").axes
    raw, centred, expected = lines(left)
    assert [y for _, y in raw + centred + expected] == [0.5, 0.2, -0.1, -0.1, -0.2, -0.2]
    assert [list(s[:, 1]) for s in left.collections[0].get_segments()] == [[0.1, 0.9], [0.0, 0.6]]
    assert [[y for _, y in line] for line in lines(right)] == [[0.6, 0.3], [0, 0.4], [0.7, 0.8]]


@pytest.mark.parametrize("name", ["overlap", "similarity"])
def test_a_layer_without_two_experts_is_described(name):
    alone = TABLES[name].query("expert_a == expert_b")
    assert "two experts" in plots.describe(getattr(plots, name), alone)
