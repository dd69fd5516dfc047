import pandas as pd
import pytest

from moee_analysis import plots
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, words


def test_both_curves_begin_before_training_and_the_lowest_epoch_has_a_ring():
    left, right = figure_of("history").axes
    for curve in ([[0, 0.5], [1, 0.2], [2, 0.3]], [[1, 0.2]], [[1, 0.4], [2, 0.3]]):
        assert curve in lines(left)
    for curve in ([[0, 80], [1, 90], [2, 88]], [[1, 90]]):
        assert curve in lines(right)
    assert [line.get_ydata()[0] for line in left.lines if line.get_linestyle() == ":"] == [0.5]
    assert "nats" in left.get_ylabel()
    assert "epoch" in right.get_xlabel()
    assert legend(left) == ["on images held out", "training loss"]


def test_every_system_has_a_history():
    both = [TABLES["history"].assign(system=system) for system in ("MoEE", "static")]
    both = pd.concat(both, ignore_index=True)
    assert legend(plots.history(both).axes[0]) == ["MoEE", "static"]
    assert plots.describe(plots.history, both).count("its lowest, after epoch 1") == 2


def test_fine_tuning_has_a_line_before_and_after_with_seeds_beside():
    (ax,) = figure_of("fine_tuning").axes
    before, seeds, after = ax.lines[:3]
    assert before.get_ydata() == pytest.approx([99, 90])
    assert after.get_ydata() == pytest.approx([100, 95])
    assert (before.get_linestyle(), after.get_linestyle()) == ("--", "-")
    assert seeds.get_ydata() == pytest.approx([99, 101, 94, 96])
    assert (seeds.get_xdata() > after.get_xdata().min()).all()
    assert ax.collections[1].get_segments()[0][:, 1] == pytest.approx([80, 120])
    names = ["MoEE", "before fine-tuning", "after fine-tuning", "dense model"]
    assert legend(figure_of("fine_tuning")) == names


def test_learning_is_a_line_with_a_band_for_every_start():
    (ax,) = figure_of("learning_curves").axes
    assert legend(figure_of("learning_curves")) == ["a", "b"]
    assert lines(ax) == [[[0, 10], [64, 60]], [[0, 10], [64, 40]]]
    assert len(ax.collections) == 2
    assert "%" in ax.get_ylabel()


def test_ends_and_images_needed_stand_side_by_side():
    left, right = figure_of("learned").axes
    assert words(left.get_yticklabels()) == ["a", "b", "c"]
    dots = [tuple(dot.get_offsets()[0]) for dot in left.collections[:3]]
    assert dots == [(60, 0), (40, 1), (50, 2)]
    ends = [bars.get_segments()[0][:, 0] for bars in left.collections[3:]]
    assert ends == [pytest.approx([50, 70]), pytest.approx([58, 62])]  # interval, seeds
    reached, arrows, crosses = [marks.get_offsets().tolist() for marks in right.collections[1:]]
    end = right.get_xlim()[1]
    assert (reached, arrows, crosses) == ([[30, 0], [40, 2]], [[end, 2]], [[end, 1]])
    assert right.get_xlabel() == "images seen until 50 % top-1"
    said = plots.describe(plots.learned, TABLES["learned"][1:2])
    assert said.endswith("No start reaches 50.0 %.")


def test_sure_differences_are_bold():
    ax = figure_of("which_beats_which").axes[0]
    found = {text.get_text(): text.get_weight() for text in ax.texts}
    assert list(found) == ["+20.0", "+5.0", "-20.0", "-15.0", "-5.0", "+15.0"]
    assert [name for name in found if found[name] == "bold"] == ["+20.0", "-20.0"]


def test_contributions_have_a_line_for_each_group_and_the_range_of_seeds():
    first, second = figure_of("contributions").axes
    assert lines(first) == [[[6, 2], [7, 4]], [[6, 0.5], [7, 0.5]]]
    assert legend(first) == ["core", "universal"]
    band = first.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 3)
    assert second.get_title(loc="left") == "over length of whole output"
    only = plots.contributions(TABLES["contributions"].drop(columns="relative"))
    assert len(only.axes) == 1
