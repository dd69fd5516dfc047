from __future__ import annotations

import pandas as pd
import pytest

from moee_analysis import plots
from moee_analysis.plots import style


@pytest.fixture
def table():
    row = {
        "low": 0.7, "high": 0.8, "top5": 0.9, "retention": 0.95, "retention_low": 0.93,
        "retention_high": 0.97, "agreement": 0.8, "kl": 0.1, "reference_top1": 0.8, "n_images": 500,
    }  # fmt: skip
    return pd.DataFrame(
        [{"system": "dense", "top1": 0.8} | row, {"system": "MoEE", "top1": 0.76} | row]
    )


def test_a_dot_for_every_system(table):
    fig = plots.accuracy(table)
    left, right = fig.axes
    assert left.collections[1].get_offsets()[:, 0].tolist() == pytest.approx([80, 76])
    assert [label.get_text() for label in left.get_yticklabels()] == ["dense", "MoEE"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "retention", "agreement",
    ]  # fmt: skip
    assert "500 images" in fig.texts[-1].get_text()
    assert "%" in left.get_xlabel()


def test_without_a_reference_there_is_one_panel(table):
    compared = ["retention", "retention_low", "retention_high", "agreement", "kl", "reference_top1"]
    fig = plots.accuracy(table.assign(**dict.fromkeys(compared, float("nan"))))
    assert len(fig.axes) == 1


def test_ones_own_caption(table):
    fig = plots.accuracy(table, caption="On the bundled scenes.")
    assert fig.texts[-1].get_text() == "On the bundled scenes."
    assert style.GREY in style.colours(table["system"]).values()
