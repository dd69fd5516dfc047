from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figures.inference import inference

from moee_analysis.plots import style

SYSTEMS = {"dense": 1.0, "dense, MLPs in blocks": 1.0, "static pruning": 1.39, "best": 1.41}
ROUTED = list(SYSTEMS)[1:]
BATCHES = [1, 8, 64]


def table_of(threads=(1, 2), systems=SYSTEMS):
    rows = [
        {
            "system": system, "batch": batch, "threads": count, "promised": promised,
            "speedup": promised - 0.1 / batch, "speedup_low": promised - 0.2 / batch,
            "speedup_high": promised + 0.1 / count,
        }
        for count in threads
        for batch in BATCHES
        for system, promised in systems.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def table():
    return table_of()


def lines_of(ax):
    """What is drawn of each system, in the order of the table."""
    return [line.get_xydata() for line in ax.lines if line.get_marker() != "None"]


def levels_of(ax, kind):
    """Where level lines of one kind lie."""
    lines = [line for line in ax.lines if line.get_marker() == "None"]
    return [line.get_ydata()[0] for line in lines if line.get_linestyle() == kind]


def names_in(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_a_panel_for_each_number_of_threads_and_a_line_for_each_system(table):
    fig = inference(table)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["1 thread", "2 threads"]
    for ax, threads in zip(fig.axes, (1, 2), strict=True):
        for system, points in zip(ROUTED, lines_of(ax), strict=True):
            rows = table[(table["system"] == system) & (table["threads"] == threads)]
            assert points[:, 1] == pytest.approx(rows["speedup"].to_numpy())
            assert points[:, 0] == pytest.approx(BATCHES, rel=0.2)


def test_quartiles_are_the_table_s(table):
    ax = inference(table).axes[0]
    drawn = [segment[:, 1] for segment in ax.collections[-1].get_segments()]
    rows = table[(table["system"] == "best") & (table["threads"] == 1)]
    assert drawn == pytest.approx(rows[["speedup_low", "speedup_high"]].to_numpy())


def test_promises_are_dotted_and_the_dense_model_is_at_1(table):
    for ax in inference(table).axes:
        assert levels_of(ax, ":") == [1.39, 1.41]
        assert levels_of(ax, "-") == [1]


def test_batches_double_along_the_axis_and_stand_there_as_numbers(table):
    fig = inference(table)
    fig.draw_without_rendering()
    for ax in fig.axes:
        assert ax.get_xscale() == "log"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "64"]
        assert "images" in ax.get_xlabel()
        low, high = ax.get_xlim()
        assert 0 < low < BATCHES[0] < BATCHES[-1] < high
    assert "time / time" in fig.get_supylabel()


def test_no_two_systems_look_alike_and_none_is_grey(table):
    lines = [line for line in inference(table).axes[0].lines if line.get_marker() != "None"]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len({color for color, _ in looks}) == len(ROUTED)
    assert style.GREY not in {color for color, _ in looks}


def test_the_legend_names_systems_and_levels(table):
    assert names_in(inference(table)) == [*ROUTED, "promised by the MACs", "dense model"]


def test_many_numbers_of_threads_stand_in_rows():
    fig = inference(table_of(threads=(1, 2, 4, 8, 16)))
    assert len(fig.axes) == 5
    assert len({round(ax.get_position().y0, 2) for ax in fig.axes}) == 2


def test_one_system_stands_at_its_batches():
    fig = inference(table_of(threads=(1,), systems={"dense": 1.0, "best": 1.4}))
    (points,) = lines_of(fig.axes[0])
    assert np.array_equal(points[:, 0], BATCHES)


def test_neither_legend_nor_labels_touch(table):
    fig = inference(table, caption="many words " * 30)
    fig.draw_without_rendering()
    legend = fig.legends[0].get_window_extent()
    assert legend.x1 <= fig.bbox.width
    caption = next(text for text in fig.texts if text.get_text().startswith("many"))
    for ax in fig.axes:
        assert ax.get_tightbbox().x1 <= legend.x0
        assert ax.xaxis.label.get_window_extent().y0 > caption.get_window_extent().y1


def test_ones_own_caption(table):
    captions = inference(table, caption="On two cores.").texts
    assert captions[-1].get_text() == "On two cores."
    table.attrs["caption"] = "As measured."
    assert inference(table).texts[-1].get_text() == "As measured."
