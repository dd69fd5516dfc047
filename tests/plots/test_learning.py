from __future__ import annotations

import math

import pandas as pd
import pytest

from moee_analysis import measure, plots
from tests.measure.training.test_learning_curves import RISING, trainings_of

TRAINED = trainings_of(RISING)


def test_a_line_with_a_band_for_every_start():
    table = measure.learning_curves(TRAINED)
    fig = plots.learning_curves(table)
    (ax,) = fig.axes
    assert [line.get_label() for line in ax.lines] == ["a", "b", "c"]
    first = table[table["start"] == "a"].drop_duplicates("images")
    assert ax.lines[0].get_xdata().tolist() == [0, 10, 20]
    assert ax.lines[0].get_ydata() == pytest.approx(100 * first["mean"].to_numpy())
    assert len(ax.collections) == 3
    assert "%" in ax.get_ylabel()


def test_ends_and_images_needed_stand_side_by_side():
    table = measure.learned(TRAINED, level=0.7)
    left, right = plots.learned(table, caption="of a test").axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b", "c"]
    drawn = left.collections[-1].get_offsets()[:, 0]
    assert drawn.tolist() == pytest.approx((100 * table["top1"]).tolist())
    marks = [line.get_marker() for line in right.lines]
    assert (marks.count("o"), marks.count("x"), marks.count(">")) == (1, 2, 0)
    assert "70 %" in right.get_xlabel()
    barely = measure.learned(TRAINED, level=table["top1"].iloc[0])
    (first, *_) = plots.learned(barely).axes[1].lines
    assert first.get_marker() == ">"


def test_sure_differences_are_bold():
    table = measure.which_beats_which(TRAINED)
    ax = plots.which_beats_which(table).axes[0]
    found = {t.get_position(): (t.get_text(), t.get_weight()) for t in ax.texts}
    assert len(found) == 6
    there = table.set_index(["start_a", "start_b"]).loc[("a", "b")]
    assert found[1, 0] == (f"{100 * there['difference']:+.1f}", "bold")
    assert found[2, 1][1] == "normal"


def test_contributions_have_a_line_for_each_group_and_the_range_of_seeds():
    table = pd.DataFrame(
        {"layer": layer, "group": group, "seed": seed, "contribution": 1.0 + layer + seed,
         "relative": 0.5, "mass": 0.5}
        for layer in (2, 3) for group in ("core", "universal") for seed in (0, 1)
    )  # fmt: skip
    first, *others = plots.contributions(table).axes
    assert len(others) == 2
    assert [line.get_label() for line in first.lines] == ["core", "universal"]
    assert first.lines[0].get_ydata().tolist() == [3.5, 4.5]
    only = plots.contributions(table.drop(columns=["relative", "mass"]))
    assert len(only.axes) == 1
    assert not math.isnan(only.axes[0].get_ylim()[1])
