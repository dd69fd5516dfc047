import json
import math
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from moee_analysis import plots
from moee_analysis.errors import MoeeError
from moee_analysis.utils import environment
from tests.helpers.plot_tables import CAPTION, TABLES, figure_of, shown_in

SAID, FIGURES = (
    json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    for name in ("descriptions.json", "figures.json")
)
OWN_FACTS = ("accuracy", "routing", "balance")
SENTENCE = re.compile(r"[A-Z0-9−].*\.", re.DOTALL)

every = pytest.mark.parametrize("name", TABLES)


def assert_apart(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def describe(name, table):
    return plots.describe(getattr(plots, name), table)


@every
def test_draws_a_closed_figure_and_leaves_settings_and_table_alone(name):
    before, settings = TABLES[name].copy(), dict(mpl.rcParams)
    fig = getattr(plots, name)(TABLES[name], caption="my words")
    assert fig.texts[-1].get_text() == "my words"
    assert not plt.get_fignums()
    assert dict(mpl.rcParams) == settings
    assert TABLES[name].equals(before)


@every
def test_names_what_it_shows_and_nothing_touches(name):
    fig = figure_of(name)
    fig.draw_without_rendering()
    written = " ".join(fig.texts[-1].get_text().split())
    assert CAPTION in written if name not in OWN_FACTS else re.match(r"\d+ images", written)
    top = fig.texts[-1].get_window_extent().y1
    for ax in fig.axes:
        titles = ax.get_title(loc="left"), ax.get_ylabel(), ax.get_xlabel(), fig.get_supylabel()
        assert any(titles)
        box = ax.get_tightbbox()
        assert top < box.y0 < box.y1 <= fig.bbox.height + 1
        assert -1 <= box.x0 < box.x1 <= fig.bbox.width + 1
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            assert_apart([label for label in ticks if label.get_visible()])
        assert_apart([text for text in ax.texts if text.get_rotation() == 0])
    assert_apart([ax._left_title for ax in fig.axes])


def leaves(value):
    """The words and numbers in nested lists and mappings, and how long each of these is."""
    if isinstance(value, dict):
        value = [each for pair in value.items() for each in pair]
    if not isinstance(value, list):
        return [value]
    return [str(len(value)), *(leaf for each in value for leaf in leaves(each))]


@every
def test_shows_every_number_of_its_table_where_it_belongs(name):
    """``python -m tests.helpers.plot_tables`` writes anew what is expected."""
    found, expected = leaves(shown_in(figure_of(name))), leaves(FIGURES[name])
    words, numbers = (
        [[leaf for leaf in each if isinstance(leaf, kind)] for each in (found, expected)]
        for kind in (str, (int, float))
    )
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, nan_ok=True)


@every
def test_describes_the_table_whatever_its_index(name):
    table = TABLES[name].copy()
    assert describe(name, table) == SAID[name]
    assert describe(name, table.set_index(pd.Index(range(7, 7 + len(table))))) == SAID[name]
    assert table.equals(TABLES[name])


@every
def test_describes_a_table_of_which_nothing_or_one_row_is_known(name):
    table = TABLES[name].copy()
    last = table[table["component"] == "total"] if name == "macs" else table
    one = last.head(1) if name != "surrogate" else last
    assert SENTENCE.fullmatch(describe(name, one))
    table[table.select_dtypes("float").columns] = math.nan
    said = describe(name, table)
    assert SENTENCE.fullmatch(said)
    assert not re.search(r"\bnan\b", said)


def test_every_plot_that_is_public_or_in_a_notebook_is_tested_here():
    public = {name for name in vars(plots) if callable(vars(plots)[name])} - {"describe"}
    shown = set()
    for path in environment.own_folder("notebooks").glob("*.ipynb"):
        shown |= set(re.findall(r"\bplots\.(\w+)", path.read_text(encoding="utf-8")))
    pictures = {"patches", "image_layers", "pieces", "top_patches"}
    assert shown - {"describe"} <= public == {*TABLES, *pictures}


def test_a_plot_without_a_description_is_refused():
    def accuracy():
        """Bears the name of a plot that has one."""

    with pytest.raises(MoeeError, match="none for 'accuracy'"):
        plots.describe(accuracy, TABLES["accuracy"])
