"""Tables that lack something, or have more of it than those that every plot is tested with."""

import math

import pandas as pd
import pytest

from moee_analysis import plots
from tests.helpers.plot_tables import TABLES, figure_of, legend, lines, panel, titles, words

COMPARED = ["retention", "retention_low", "retention_high", "agreement", "kl", "reference_top1"]


def describe(name, table):
    return plots.describe(getattr(plots, name), table)


@pytest.mark.parametrize(("name", "table", "said"), [
    ("accuracy", TABLES["accuracy"].assign(**dict.fromkeys(COMPARED, math.nan)),
     "Top-1 is: dense 90.0 %, MoEE 45.0 % and random 9.0 %."),
    ("routing_controls", TABLES["routing_controls"].assign(random_routing=math.nan),
     "No system has a router to compare."),
    ("layers", TABLES["layers"].assign(converted=False),
     "0 of 3 layers have clusters: all stay dense."),
    *((name, TABLES[name].query("expert_a == expert_b"),
       "No layer has two experts to compare.") for name in ("overlap", "similarity")),
])  # fmt: skip
def test_what_a_table_lacks_is_told(name, table, said):
    assert describe(name, table) == said


@pytest.mark.parametrize(("name", "table", "expected"), [
    ("accuracy", TABLES["accuracy"].assign(**dict.fromkeys(COMPARED, math.nan)), [""]),
    ("embedding", TABLES["embedding"].assign(cluster=-1),
     ["layer 3: 0 clusters, 100% noise", "layer 5: 0 clusters, 100% noise"]),
    ("contributions", TABLES["contributions"].drop(columns="relative"), ["length added"]),
])  # fmt: skip
def test_there_are_panels_for_what_is_there(name, table, expected):
    assert titles(getattr(plots, name)(table).axes) == expected


@pytest.mark.parametrize(
    "name", ["parts_unseen", "class_knock_out", "knock_out", "which_beats_which"]
)
def test_numbers_that_are_not_known_leave_a_figure_all_the_same(name):
    table = TABLES[name].copy()
    table[table.select_dtypes("float").columns] = math.nan
    getattr(plots, name)(table).draw_without_rendering()


def test_several_systems_are_named():
    table = TABLES["neurons"]
    both = pd.concat([table, table.assign(system="random centres")], ignore_index=True)
    assert "in layer 3 of random centres" in describe("neurons", both)
    assert titles(plots.neurons(both).axes)[2] == "random centres\nlayer 3: 4 hidden neurons"
    both = [TABLES["history"].assign(system=system) for system in ("MoEE", "static")]
    both = pd.concat(both, ignore_index=True)
    assert legend(plots.history(both).axes[0]) == ["MoEE", "static"]
    assert describe("history", both).count("its lowest, after epoch 1") == 2
    assert legend(plots.routing(TABLES["routing"].query("system == 'MoEE'"))) == []
    for name in ("overlap", "similarity"):  # in titles of two lines
        table = TABLES[name]
        fig = getattr(plots, name)(pd.concat([table, table.assign(system="other")]))
        fig.draw_without_rendering()
        assert max(ax.get_tightbbox().y1 for ax in fig.axes) <= fig.bbox.height


def test_seeds_are_averaged_and_intervals_are_there_where_they_are_known():
    twice = pd.concat([TABLES["comparison"], TABLES["comparison"].assign(seed=2)])
    assert lines(plots.comparison(twice).axes[0]) == lines(figure_of("comparison").axes[0])
    without = plots.balance(TABLES["balance"].assign(low=math.nan, high=math.nan))
    assert "95 %" not in without.texts[-1].get_text()
    assert not panel(without, "Gini").collections


def test_classes_parts_and_starts_that_are_not_there_leave_room():
    alone = TABLES["specificity"].query("class_name == 'all'")
    assert len(lines(plots.specificity(alone).axes[0])) == 2
    alone = plots.class_distance(TABLES["class_distance"].drop(columns=["family_a", "family_b"]))
    assert not alone.axes[0].lines
    few = plots.part_profile(TABLES["part_profile"], parts=1).axes[0]
    assert words(few.get_xticklabels()) == ["sky"]
    said = describe("learned", TABLES["learned"][1:2])
    assert said.endswith("No start reaches 50.0 %.")
