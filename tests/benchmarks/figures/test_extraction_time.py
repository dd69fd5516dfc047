from __future__ import annotations

import pandas as pd
import pytest
from figures.extraction_time import extraction_time

from moee_analysis.plots import style


@pytest.fixture
def table():
    rows = [("best", 100, "recording", 3.0), ("best", 100, "other", 1.0)]
    rows += [
        ("best", 200, "recording", 2.5),
        ("best", 200, "refit", 0.5),
        ("paper", 100, "other", 9),
    ]
    return pd.DataFrame(rows, columns=["recipe", "images", "stage", "passes"])


def test_stages_are_stacked_to_the_whole(table):
    best, paper = extraction_time(table).axes
    bars = {bar.get_label(): [(b.get_y(), b.get_height()) for b in bar] for bar in best.containers}
    assert bars["recording"] == [(0, 3), (0, 2.5)]
    assert bars["refit"] == [(3, 0), (2.5, 0.5)]
    assert bars["other"] == [(3, 1), (3, 0)]
    assert [text.get_text() for text in best.texts] == ["4.0", "3.0"]
    assert [text.get_text() for text in paper.texts] == ["9.0"]


def test_axes_are_named_and_a_legend_has_every_stage_once(table):
    fig = extraction_time(table, caption="Here.")
    assert fig.axes[0].get_ylabel() == "time (plain forward passes)"
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["recipe best", "recipe paper"]
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["100", "200"]
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["recording", "refit", "other"]
    assert fig.texts[-1].get_text() == "Here."


def test_what_is_left_is_grey(table):
    bars = {bar.get_label(): bar for bar in extraction_time(table).axes[0].containers}
    assert bars["other"][0].get_facecolor()[:3] == pytest.approx(
        tuple(int(style.GREY[i : i + 2], 16) / 255 for i in (1, 3, 5))
    )
