from __future__ import annotations

import pytest

from moee_analysis import measure, plots
from tests.helpers.toys import toy_moe, toy_vit


@pytest.fixture(scope="module")
def table():
    return measure.macs(toy_moe(toy_vit(), layers={1, 2}))


def test_bars_are_the_table(table):
    left, right = plots.macs(table).axes
    mlps = table[table["layer"] >= 0]
    for ax, column in ((left, "macs"), (right, "params")):
        heights = [bar.get_height() for bar in ax.patches if not bar.get_hatch()]
        now, dense = mlps[column] / 1e6, mlps[f"{column}_dense"] / 1e6
        assert heights == pytest.approx([*now, *dense])


def test_what_goes_to_tokens_that_nothing_reads_is_hatched(table):
    left, right = plots.macs(table).axes
    now, dense = [bar for bar in left.patches if bar.get_hatch()]
    last = table[table["layer"] == 2].iloc[0]
    for bar, column in ((now, "macs"), (dense, "macs_dense")):
        assert bar.get_height() == pytest.approx(last[column.replace("macs", "macs_unread")] / 1e6)
        assert bar.get_y() + bar.get_height() == pytest.approx(last[column] / 1e6)
    assert not any(bar.get_hatch() for bar in right.patches)


def test_titles_give_the_totals_of_the_network(table):
    left, right = plots.macs(table).axes
    total = table.iloc[-1]
    saved = 100 * (1 - total["macs"] / total["macs_dense"])
    assert f"−{saved:.1f} %" in left.get_title(loc="left")
    assert "parameters" in right.get_title(loc="left")


def test_the_caption_says_how_it_was_counted(table):
    text = plots.macs(table).texts[-1].get_text().replace("\n", " ")
    assert "1 MAC = 2 FLOPs" in text
    assert "calibration" in text
