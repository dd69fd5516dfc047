from __future__ import annotations

import math

import pandas as pd
import pytest
from figures.clustering_time import clustering_time


@pytest.fixture
def table():
    rows = [("ours", n, 1e-5 * n**1.5, 0.5 + n / 1e5, 1.5) for n in (5000, 1000, 20_000)]
    rows += [("theirs", n, 1e-6 * n**2, 1.0, math.nan) for n in (1000, 5000)]
    return pd.DataFrame(rows, columns=["system", "tokens", "seconds", "peak_gb", "exponent"])


def test_a_line_for_each_system_in_both_panels(table):
    for ax, column in zip(clustering_time(table).axes, ("seconds", "peak_gb"), strict=True):
        assert ax.get_xscale() == "log"
        for line, (_, rows) in zip(ax.lines, table.groupby("system", sort=False), strict=True):
            expected = rows.sort_values("tokens")[["tokens", column]].to_numpy()
            assert line.get_xydata() == pytest.approx(expected)


def test_axes_have_units_and_the_legend_has_exponents(table):
    time, memory = clustering_time(table).axes
    assert (time.get_ylabel(), memory.get_ylabel()) == ("time (s)", "largest memory (GB)")
    assert time.get_xlabel() == memory.get_xlabel() == "tokens"
    assert (time.get_yscale(), memory.get_yscale(), memory.get_ylim()[0]) == ("log", "linear", 0)
    assert {label.get_text() for label in time.get_xticklabels()} == {"1k", "5k", "20k"}
    names = [text.get_text() for text in time.get_legend().get_texts()]
    assert names == ["ours: n^1.50", "theirs"]


def test_systems_look_different(table):
    lines = clustering_time(table).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 2
    assert len({line.get_color() for line in lines}) == 2


def test_ones_own_caption(table):
    assert clustering_time(table, caption="Here.").texts[-1].get_text() == "Here."
