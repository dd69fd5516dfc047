from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from moee_analysis import measure, plots


def drawn(fig: Figure) -> Figure:
    assert isinstance(fig, Figure)
    assert not plt.get_fignums()
    fig.canvas.draw()
    return fig


def test_layers_marks_those_that_stayed_dense(small_run):
    table = measure.layers(small_run)
    table.loc[0, ["converted", "experts"]] = [False, 0]
    fig = drawn(plots.layers(table, caption="told"))
    crosses = [line for line in fig.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses[0].get_xdata()) == list(table.loc[~table["converted"], "index"])


def test_surrogate_draws_both_kinds_side_by_side():
    rows = [(2, "activations", 9, 0.2), (2, "surrogate", 4, 0.6)]
    table = pd.DataFrame(rows, columns=["layer", "data", "clusters", "noise_share"])
    fig = drawn(plots.surrogate(table))
    assert sorted(bar.get_height() for bar in fig.axes[0].patches) == [4, 9]


def test_class_relatedness_draws_a_line_per_system():
    table = pd.DataFrame(
        {
            "system": ["MoEE", "MoEE", "random centres", "random centres"],
            "layer": [0, 1, 0, 1],
            "spearman": [0.1, 0.4, 0.2, 0.3],
            "null_high": [0.2, 0.2, 0.25, 0.2],
        }
    )
    fig = drawn(plots.class_relatedness(table))
    solid = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in solid] == [[0.1, 0.4], [0.2, 0.3]]
