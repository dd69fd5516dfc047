from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis import measure, plots
from tests.helpers.toys import toy_images, toy_moe, toy_vit


@pytest.fixture(scope="module")
def both():
    routes = measure.routes(toy_moe(toy_vit()), toy_images())
    other = measure.routes(toy_moe(toy_vit(), n_experts=7, seed=1), toy_images())
    return [routes, replace(other, system="other")]


def legend(fig):
    return [text.get_text() for one in fig.legends for text in one.get_texts()]


def test_a_panel_for_every_layer_and_steps_of_area_one(both):
    fig = plots.routing(measure.routing(both))
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["layer 0", "layer 1", "layer 2"]
    assert legend(fig) == ["MoEE", "other"]
    for steps in fig.axes[1].patches:
        heights, edges, _ = steps.get_data()
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
        assert (np.diff(heights) <= 0).all()


def test_the_caption_tells_experts_and_images(both):
    text = plots.routing(measure.routing(both)).texts[-1].get_text().replace("\n", " ")
    assert text == "24 images. MoEE: 4 experts, k = 1; other: 7 experts, k = 1."


def test_a_single_system_needs_no_legend(both):
    assert legend(plots.routing(measure.routing(both[0]))) == []


def test_balance_draws_every_metric_against_the_layers(both):
    table = measure.balance(both, resamples=20)
    fig = plots.balance(table)
    assert len(fig.axes) == table["metric"].nunique()
    gini = table[(table["metric"] == "gini") & (table["system"] == "other")]
    line = next(line for line in fig.axes[1].lines if line.get_label() == "other")
    np.testing.assert_array_equal(line.get_ydata(), gini["value"])
    assert legend(fig) == ["MoEE", "other"]
    assert "95 %" in fig.texts[-1].get_text()


def test_balance_without_intervals(both):
    fig = plots.balance(measure.balance(measure.routing(both)))
    assert "95 %" not in fig.texts[-1].get_text()
