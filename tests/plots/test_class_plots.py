from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moee_analysis import measure, plots
from tests.helpers.made_routes import drawn_routes

QUICK = {"permutations": 5, "resamples": 5}
FAMILIES = {f"class {c}": "even" if c % 2 == 0 else "odd" for c in range(4)}


@pytest.fixture(scope="module")
def systems():
    return [drawn_routes(effect=0.4), drawn_routes(system="random centres", seed=1)]


@pytest.fixture(scope="module")
def tables(systems):
    distance = measure.class_distance(systems, families=FAMILIES)
    return {
        "class_routing": measure.class_routing(systems),
        "specificity": measure.specificity(systems, **QUICK),
        "class_information": measure.class_information(systems, **QUICK),
        "class_distance": distance,
        "family_separation": measure.family_separation(distance, permutations=20),
    }


NAMES = (
    "class_routing",
    "specificity",
    "class_information",
    "class_distance",
    "family_separation",
)


@pytest.mark.parametrize("name", NAMES)
def test_draws_a_closed_figure_and_leaves_the_table_alone(tables, name):
    before = tables[name].copy()
    fig = getattr(plots, name)(tables[name])
    fig.savefig(io.BytesIO(), dpi=40)
    assert not plt.get_fignums()
    assert tables[name].equals(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_caption_is_the_one_given_or_the_measure_s(tables, name):
    words = tables[name].attrs["caption"].split()
    assert words[:3] == written(getattr(plots, name)(tables[name])).split()[:3]
    assert written(getattr(plots, name)(tables[name], caption="my words")) == "my words"


def written(fig):
    return fig.texts[-1].get_text()


def test_class_routing_orders_experts_by_their_use(tables):
    table = tables["class_routing"].query("system == 'MoEE'")
    fig = plots.class_routing(table)
    assert len(fig.axes) == 2 * 4
    everyone, one = fig.axes[1].containers
    heights = [bar.get_height() for bar in everyone]
    assert heights == sorted(heights, reverse=True)
    part = table[(table["layer"] == 0) & (table["class_name"] == "class 1")]
    expected = part.sort_values("share_all", ascending=False)["share"]
    np.testing.assert_allclose([bar.get_height() for bar in one], expected)


def test_specificity_draws_a_line_per_class_and_the_mean(tables):
    fig = plots.specificity(tables["specificity"])
    assert len(fig.axes) == 2
    assert len(fig.axes[0].lines) == 4 + 2
    mean = tables["specificity"].query("system == 'MoEE' and class_name == 'all'")["js"]
    np.testing.assert_allclose(fig.axes[0].lines[4].get_ydata(), mean)


def test_specificity_of_no_class_but_all(tables):
    every = tables["specificity"].query("class_name == 'all'")
    assert len(plots.specificity(every).axes[0].lines) == 2


def test_class_distance_names_classes_in_order(tables):
    fig = plots.class_distance(tables["class_distance"].query("system == 'MoEE'"))
    names = [tick.get_text() for tick in fig.axes[0].get_yticklabels()]
    assert names == ["class 0", "class 2", "class 1", "class 3"]


def test_class_distance_without_families(systems):
    fig = plots.class_distance(measure.class_distance(systems[0], layers=[0]))
    assert not fig.axes[0].lines
