from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from figures.fidelity import fidelity

FREE = [(0.2, math.nan), (0.28, math.nan), (0.36, math.nan)]
BOUND = [(0.29, 0.2), (0.29, 0.18), (0.36, 0.32)]
SYSTEMS = {"magnitude": "static", "variance": "static", "best": "experts", "random": "controls"}


def table_of(systems=SYSTEMS, budgets=(*FREE, *BOUND)):
    rows = [
        {
            "system": system, "family": family, "macs_asked": macs, "params_asked": params,
            "macs_reduction": macs + 0.001, "retention": 0.9 - macs / 10 - 0.1 * place,
            "retention_low": 0.85 - macs / 10 - 0.1 * place,
            "retention_high": 0.92 - macs / 10 - 0.1 * place,
        }
        for place, (system, family) in enumerate(systems.items())
        for macs, params in budgets
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def table():
    return table_of()


def lines_of(ax):
    """What is drawn of each system, in the order of the table; the last line is the dense model."""
    return [line.get_xydata() for line in ax.lines[:-1]]


def names_in(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def test_a_line_for_every_system_in_both_panels(table):
    free, bound = fidelity(table).axes
    for ax, chosen in (
        (free, table["params_asked"].isna()),
        (bound, table["params_asked"].notna()),
    ):
        drawn = dict(zip(SYSTEMS, lines_of(ax), strict=True))
        for system, points in drawn.items():
            rows = table[chosen & (table["system"] == system)]
            assert sorted(points[:, 1]) == pytest.approx(sorted(100 * rows["retention"]))
            assert (np.diff(points[:, 0]) > 0).all()


def test_budgets_of_macs_stand_at_what_was_saved(table):
    free = fidelity(table).axes[0]
    for points in lines_of(free):
        assert points[:, 0] == pytest.approx([20.1, 28.1, 36.1], abs=0.5)
    assert "%" in free.get_xlabel()
    assert "%" in free.get_ylabel()


def test_budgets_of_both_are_named_in_order(table):
    bound = fidelity(table).axes[1]
    names = [label.get_text() for label in bound.get_xticklabels()]
    assert names == ["−29 %\n−18 %", "−29 %\n−20 %", "−36 %\n−32 %"]


def test_intervals_are_the_table_s_and_dense_is_at_100(table):
    free = fidelity(table).axes[0]
    first = free.collections[0].get_segments()
    rows = table[(table["system"] == "magnitude") & table["params_asked"].isna()]
    ends = 100 * rows[["retention_low", "retention_high"]].to_numpy()
    assert [segment[:, 1] for segment in first] == pytest.approx(ends)
    assert list(free.lines[-1].get_ydata()) == [100, 100]


def test_no_two_systems_look_alike_and_families_share_a_kind_of_line(table):
    free = fidelity(table).axes[0]
    looks = [
        (line.get_color(), line.get_marker(), line.get_linestyle()) for line in free.lines[:-1]
    ]
    assert len({look[0] for look in looks}) == len(SYSTEMS)
    assert looks[0][2] == looks[1][2]
    assert len({look[2] for look in looks}) == 3
    assert looks[0][1] != looks[1][1]


def test_the_legend_names_the_systems_below_their_families(table):
    assert names_in(fidelity(table)) == [
        "static", "magnitude", "variance", "experts", "best", "controls", "random", "dense model",
    ]  # fmt: skip


@pytest.mark.parametrize(("budgets", "title"), [(FREE, "free"), (BOUND, "bound")])
def test_one_kind_of_budget_has_one_panel(budgets, title):
    (ax,) = fidelity(table_of(budgets=budgets)).axes
    assert title in ax.get_title(loc="left")


def test_what_could_not_be_reached_is_left_out(table):
    gone = table["system"].isin(["random"]) | (
        (table["system"] == "best") & table["params_asked"].notna()
    )
    measures = ["macs_reduction", "retention", "retention_low", "retention_high"]
    table.loc[gone, measures] = math.nan
    fig = fidelity(table)
    assert [len(lines_of(ax)) for ax in fig.axes] == [3, 2]
    assert "random" not in names_in(fig)


def test_nothing_to_draw_is_an_empty_panel(table):
    fig = fidelity(table.assign(retention=math.nan))
    assert len(fig.axes) == 1
    assert names_in(fig) == ["dense model"]


def test_neither_legend_nor_labels_touch():
    systems = {f"a system with a long name {n}": f"family {n // 3}" for n in range(8)}
    fig = fidelity(table_of(systems), caption="many words " * 30)
    fig.draw_without_rendering()
    legend = fig.legends[0].get_window_extent()
    assert legend.x1 <= fig.bbox.width
    for ax in fig.axes:
        assert ax.get_tightbbox().x1 <= legend.x0
        assert ax.xaxis.label.get_window_extent().y0 > fig.texts[-1].get_window_extent().y1
    left, right = (ax.xaxis.label.get_window_extent() for ax in fig.axes)
    assert left.x1 < right.x0


def test_ones_own_caption(table):
    assert fidelity(table, caption="On the scenes.").texts[-1].get_text() == "On the scenes."
    table.attrs["caption"] = "As measured."
    assert fidelity(table).texts[-1].get_text() == "As measured."
