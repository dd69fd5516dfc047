"""Figures of knock-outs show what is in their tables."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moee_analysis import findings, measure, plots
from tests.helpers.colours import COLOURS, colour_model, coloured_images

FAMILIES = dict(zip(COLOURS, ["warm", "cold", "cold", "none"], strict=True))
NAMES = ("knock_out", "class_knock_out", "use_and_need", "parts_unseen")


@pytest.fixture(scope="module")
def tables():
    images, calibration = coloured_images(*range(12)), coloured_images(*range(100, 108))
    model, quick = colour_model(), {"resamples": 5}
    table = measure.knock_out(
        model, images, calibration, reference=model, families=FAMILIES, **quick
    )
    return {
        "knock_out": table,
        "class_knock_out": table,
        "use_and_need": measure.use_and_need(table, permutations=20),
        "parts_unseen": measure.parts_unseen(model, images, calibration, **quick),
    }


@pytest.mark.parametrize("name", NAMES)
def test_draws_a_closed_figure_and_leaves_the_table_alone(tables, name):
    before = tables[name].copy()
    fig = getattr(plots, name)(tables[name])
    fig.savefig(io.BytesIO(), dpi=40)
    assert not plt.get_fignums()
    assert tables[name].equals(before)
    assert fig.texts[-1].get_text().split()[:2] == tables[name].attrs["caption"].split()[:2]


def test_a_dot_is_an_expert_beside_its_control(tables):
    table = tables["knock_out"]
    rows = table[(table["kind"] == "all") & (table["what"] == "alone")]
    _, ax = plots.knock_out(table).axes[:2]
    drawn = [line for line in ax.lines if len(line.get_ydata()) == 5]
    for line, system in zip(drawn, ("expert", "random tokens"), strict=True):
        of = rows[rows["system"] == system]
        np.testing.assert_allclose(line.get_ydata(), 100 * of["top1"])


def test_classes_stand_by_family_and_experts_by_their_tokens(tables):
    table = tables["class_knock_out"]
    fig = plots.class_knock_out(table)
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["green", "blue", "white", "red"]
    numbers = [int(text.get_text()) for text in ax.get_xticklabels()]
    assert numbers == [4, 0, 1, 2, 3]
    rows = table[(table["what"] == "removed") & (table["system"] == "expert")]
    lost = rows.pivot(index="group", columns="expert", values="logp_change")
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown[0], lost.loc["green", numbers])


def test_changes_of_recall_are_in_points_and_clear_ones_have_a_dot(tables):
    table = tables["parts_unseen"]
    fig = plots.parts_unseen(table)
    ax = fig.axes[0]
    assert "red (100%)" in [text.get_text() for text in ax.get_yticklabels()]
    of = table[table["system"] == "expert"]
    assert ax.images[0].get_array().sum() == pytest.approx(100 * of["change"].sum())
    assert len(ax.lines[0].get_xdata()) == (of["high"] < 0).sum() == 4


def test_in_words_removals_stand_beside_random_tokens(tables):
    told = findings.knock_out(tables["knock_out"])
    assert told.startswith("Top-1 of 100.0 % intact (dense: 100.0 %) changes on average by")
    assert "with as many random tokens" in told
    assert "of layer 0" in findings.class_knock_out(tables["class_knock_out"])
    assert "beyond random tokens 0." in findings.use_and_need(tables["use_and_need"])
    seen = findings.parts_unseen(tables["parts_unseen"])
    assert "expert in 4 of 25 pairs" in seen
    assert "from 100.0 % by −100.0 percentage points" in seen


def test_what_is_not_known_is_not_made_up(tables):
    table = tables["knock_out"].assign(top1_dense=np.nan, logp_change=np.nan)
    plots.knock_out(table).savefig(io.BytesIO(), dpi=40)
    assert "(dense: unknown)" in findings.knock_out(table)
    assert "unknown in layer 0" in findings.class_knock_out(table)
    nothing = tables["parts_unseen"].assign(change=np.nan, high=np.nan)
    assert findings.parts_unseen(nothing).startswith("Recall of parts falls clearly: expert in 0")
