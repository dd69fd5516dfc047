from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from moee_analysis.plots import style


def test_figures_are_closed():
    style.figure(3, 2)
    style.panels(5)
    assert plt.get_fignums() == []


def test_settings_of_others_stay():
    before = dict(mpl.rcParams)
    fig, _ = style.figure(3, 2)
    style.caption(fig, "words")
    assert dict(mpl.rcParams) == before


def test_the_house_restores_after_an_error():
    before = dict(mpl.rcParams)

    @style.house
    def fails():
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fails()
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("shared_label", ["", "layer"])
def test_a_caption_stands_below_everything(shared_label):
    fig, ax = style.figure(4, 3)
    ax.set_xlabel("x")
    if shared_label:
        fig.supxlabel(shared_label)
    fig.draw_without_rendering()
    before = ax.get_window_extent().height
    style.caption(fig, "many words " * 30)
    fig.draw_without_rendering()
    top = fig.texts[-1].get_window_extent().y1
    lowest = ax.xaxis.label.get_window_extent().y0
    if shared_label:
        label = next(t for t in fig.texts if t.get_text() == shared_label).get_window_extent()
        assert label.y1 < lowest
        lowest = label.y0
    assert 0 <= fig.texts[-1].get_window_extent().y0 < top < lowest
    assert fig.texts[-1].get_window_extent().x1 <= fig.bbox.width
    assert ax.get_window_extent().height == pytest.approx(before, rel=0.05)


def test_no_caption_changes_nothing():
    fig, _ = style.figure(4, 3)
    assert style.caption(fig, None) is fig
    assert not fig.texts
    assert list(fig.get_size_inches()) == [4, 3]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (6, (2, 4)), (12, (3, 4))])
def test_panels_fill_rows(count, shape):
    fig, axes = style.panels(count, cols=4)
    assert len(axes) == len(fig.axes) == count
    assert axes[0].get_gridspec().get_geometry() == shape


def test_parts_of_a_figure_stand_above_each_other_at_their_heights():
    fig, parts = style.stacked(5, [3, 1])
    assert plt.get_fignums() == []
    assert list(fig.get_size_inches()) == [5, 4]
    axes = [part.subplots() for part in parts]
    fig.draw_without_rendering()
    upper, lower = (part.bbox for part in parts)
    assert upper.height == pytest.approx(3 * lower.height, rel=0.1)
    assert upper.y0 >= lower.y1
    style.caption(fig, "many words " * 30)
    fig.draw_without_rendering()
    assert axes[1].get_tightbbox().y0 > fig.texts[-1].get_window_extent().y1


def test_names_keep_apart():
    few = style.colours(["MoEE", "dense", "MoEE", "static"])
    assert few == {"MoEE": style.PALETTE[0], "dense": style.GREY, "static": style.PALETTE[1]}
    assert len(set(style.colours(map(str, range(12))).values())) == 12


def test_names_are_no_formulas():
    names = ["$\\frac$", "$x$", "a$b"]

    @style.house
    def drawn():
        fig, ax = style.figure(4, 3)
        ax.set_xticks(range(3), names)
        return style.caption(fig, ", ".join(names))

    fig = drawn()
    fig.canvas.draw()
    assert [text.get_text() for text in fig.axes[0].get_xticklabels()] == names
    assert not any(text.get_parse_math() for text in fig.axes[0].get_xticklabels())
