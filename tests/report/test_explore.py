import ipywidgets
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from moee_analysis.errors import MoeeError
from moee_analysis.plots import style
from moee_analysis.report import explore as explore_module
from moee_analysis.report.explore import FIGURES, DependsOn, Pictures, explore, of_table, values_of
from moee_analysis.report.notebook.results import picture

TABLE = pd.DataFrame(
    {"layer": [0, 0, 0, 3, 3], "expert": [0, 1, 2, 0, 1], "share": [0.5, 0.3, 0.2, 0.9, 0.1]}
)
TABLE.attrs["caption"] = "told once"
EXPERTS = values_of(TABLE, "expert", by="layer")


def bars(table, *, seen=None, caption=None):
    """A plot that notes the rows it was given."""
    if seen is not None:
        seen.append(table)
    fig, ax = style.figure(2, 1.5)
    ax.bar(range(len(table)), table["share"])
    return style.caption(fig, caption or table.attrs.get("caption"))


@pytest.fixture
def live(monkeypatch):
    """As in the kernel of a notebook that somebody looks at."""
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr(explore_module, "is_in_notebook", lambda: True)


def controls(panel):
    """Controls by their description."""
    return {child.description: child for child in panel.children[0].children}


def screen(panel):
    return panel.children[-1].value


@pytest.fixture
def draw():
    """A plot that notes its choices."""

    def noted(**choice):
        noted.choices.append(choice)
        return style.figure(1, 1)[0]

    noted.choices = []
    return noted


@pytest.mark.parametrize(
    ("choices", "drawn"),
    [({"layer": range(12)}, [(1,), (3,), (5,), (7,), (9,), (11,)]),
     ({"layer": range(12), "name": ["a", "b", "c", "d"]},
      [(3, "b"), (3, "d"), (9, "b"), (9, "d")]),
     ({"layer": range(12), "expert": [0, 1, 2], "shown": {"layer": [5, 11]}},
      [(5, 0), (5, 1), (5, 2), (11, 0), (11, 1), (11, 2)]),
     ({"layer": [0, 3], "expert": EXPERTS}, [(0, 0), (0, 2), (3, 0), (3, 1)])],
)  # fmt: skip
def test_headless_it_is_a_figure_of_choices_spread_evenly_or_those_that_the_notebook_says(
    draw, choices, drawn, live, monkeypatch
):
    monkeypatch.setenv("MOEE_HEADLESS", "1")  # an environment that nobody watches
    assert isinstance(explore(draw, **choices), Figure)
    assert len(draw.choices) <= FIGURES
    assert [tuple(choice.values()) for choice in draw.choices] == drawn


def test_of_table_gives_the_chosen_rows_and_values_of_the_choices_in_order_of_appearance():
    seen = []
    both = explore(of_table(bars, TABLE, seen=seen), layer=[0, 3], caption="below all")
    assert [set(rows["layer"]) for rows in seen] == [{0}, {3}]
    assert [len(rows) for rows in seen] == [3, 2]
    assert all(not rows.attrs for rows in seen)
    assert TABLE.attrs["caption"] == "told once"
    assert both.get_size_inches()[0] >= 2 * 1.5  # as sharp as its figures
    assert len(picture(both)) > len(picture(of_table(bars, TABLE)(layer=0)))
    ranked = TABLE.sort_values(["layer", "share"])
    assert values_of(ranked, "expert") == [2, 1, 0]
    assert values_of(ranked, "expert", by="layer").values == {0: [2, 1, 0], 3: [1, 0]}


def test_live_a_slider_changes_the_figure(live):
    panel = explore(of_table(bars, TABLE), layer=[0, 3], caption="below")
    slider = controls(panel)["layer"]
    assert isinstance(slider, ipywidgets.SelectionSlider)
    before = screen(panel)
    assert 'alt="layer 0"' in before
    assert "below" in before
    slider.value = 3
    assert screen(panel) != before
    assert 'alt="layer 3"' in screen(panel)


def test_live_a_choice_offers_what_the_one_before_allows(live):
    panel = explore(of_table(bars, TABLE), layer=[0, 3], expert=EXPERTS)
    pick = controls(panel)["expert"]
    pick.value = 2
    controls(panel)["layer"].value = 3
    assert [value for _, value in pick.options] == [0, 1]
    assert "layer 3, expert 0" in screen(panel)
    pick.value = 1
    controls(panel)["layer"].value = 0
    assert pick.value == 1


def test_live_texts_and_numbers_in_an_order_of_their_own_are_a_list_and_never_markup(live, draw):
    names, order = ["<script>alert(1)</script>", "b"], DependsOn("layer", {0: [2, 1, 0], 3: [1, 0]})
    panel = explore(draw, class_name=names, layer=[0, 3], expert=order)
    found = controls(panel)
    assert {name: type(control) for name, control in found.items()} == {
        "class": ipywidgets.Dropdown, "layer": ipywidgets.SelectionSlider,
        "expert": ipywidgets.Dropdown,
    }  # fmt: skip
    assert [value for _, value in found["expert"].options] == [2, 1, 0]
    assert "<script>" not in screen(panel)
    assert "&lt;script&gt;" in screen(panel)


def test_live_nothing_is_drawn_twice_or_in_between(live, draw):
    panel = explore(draw, layer=[0, 1], expert=DependsOn("layer", {0: [0, 1], 1: [0, 1, 2]}))
    controls(panel)["expert"].value = 1
    for value in (1, 0, 1):
        controls(panel)["layer"].value = value
    assert [tuple(choice.values()) for choice in draw.choices] == [(0, 0), (0, 1), (1, 1)]


def test_live_an_error_is_told_and_the_next_choice_is_drawn(live):
    def sometimes(layer):
        if layer == 1:
            raise MoeeError("a layer", "<none>", "choose another")
        return style.figure(1, 1)[0]

    panel = explore(sometimes, layer=[0, 1, 2])
    controls(panel)["layer"].value = 1
    assert "choose another" in screen(panel)
    assert "<none>" not in screen(panel)
    controls(panel)["layer"].value = 2
    assert "<img" in screen(panel)


def test_live_images_are_browsed_around(live, draw):
    thumbnails = [np.full((8, 8, 3), 40 * n, np.uint8) for n in range(3)]
    panel = explore(draw, image=Pictures(thumbnails, ["cat", "a & b", "dog"]))
    previous, slider, following, look = panel.children[0].children[0].children
    previous.click()
    assert slider.value == 2
    assert "dog, image 3 of 3" in look.value
    following.click()
    following.click()
    assert slider.value == 1
    assert "a &amp; b" in look.value
    assert [choice["image"] for choice in draw.choices] == [0, 2, 1]


def test_a_live_panel_leaves_its_first_figure_for_who_has_no_kernel(live, monkeypatch):
    shown = []
    monkeypatch.setattr(explore_module, "display", lambda output, **_: shown.append(output))
    panel = explore(of_table(bars, TABLE), layer=[0, 3], caption="below")
    panel._ipython_display_()
    widget, still = shown
    assert set(widget) == {"application/vnd.jupyter.widget-view+json"}
    assert screen(panel) in still.data


@pytest.mark.parametrize(
    ("choices", "told"),
    [({}, "a choice"), ({"layer": []}, "values of 'layer'"),
     ({"expert": DependsOn("layer", {0: [0]}), "layer": [0]}, "after 'layer'"),
     ({"layer": [0], "expert": DependsOn("layer", {0: []})}, "values of 'expert'"),
     ({"layer": [0], "shown": {"class": [0]}}, "'class'"),
     ({"layer": [0], "shown": {"layer": [7]}}, "among 0")],
)  # fmt: skip
def test_what_cannot_be_explored_is_refused(draw, choices, told):
    with pytest.raises(MoeeError, match=told):
        explore(draw, **choices)
    with pytest.raises(MoeeError, match="'class'"):
        values_of(TABLE, "class")  # a column that is not there
