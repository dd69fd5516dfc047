import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style
from tests.helpers.plot_tables import words

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"


def test_figures_are_closed_and_settings_of_others_stay_also_after_an_error():
    before = dict(mpl.rcParams)

    @style.house
    def fails():
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fails()
    fig, _ = style.figure(3, 2)
    style.panels(5)
    style.stack_parts(5, [3, 1])
    style.caption(fig, "words")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("shared_label", ["", "layer"])
def test_a_caption_stands_below_everything(shared_label):
    fig, ax = style.figure(4, 3)
    ax.set_xlabel("x")
    labels = [ax.xaxis.label, *([fig.supxlabel(shared_label)] if shared_label else [])]
    assert style.caption(fig, None) is fig  # which changes nothing
    assert (len(fig.texts), *fig.get_size_inches()) == (bool(shared_label), 4, 3)
    fig.draw_without_rendering()
    before = ax.get_window_extent().height
    style.caption(fig, "many words " * 30)
    fig.draw_without_rendering()
    caption, *boxes = [text.get_window_extent() for text in (fig.texts[-1], *reversed(labels))]
    for lower, upper in zip([caption, *boxes], boxes, strict=False):
        assert 0 <= lower.y0 < lower.y1 < upper.y0
    assert caption.x1 <= fig.bbox.width
    assert ax.get_window_extent().height == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (6, (2, 4)), (12, (3, 4))])
def test_panels_fill_rows(count, shape):
    fig, axes = style.panels(count, cols=4)
    assert len(axes) == len(fig.axes) == count
    assert axes[0].get_gridspec().get_geometry() == shape


def test_parts_of_a_figure_stand_above_each_other_at_their_heights():
    fig, parts = style.stack_parts(5, [3, 1])
    assert list(fig.get_size_inches()) == [5, 4]
    axes = [part.subplots() for part in parts]
    fig.draw_without_rendering()
    upper, lower = (part.bbox for part in parts)
    assert upper.height == pytest.approx(3 * lower.height, rel=0.1)
    assert upper.y0 >= lower.y1
    style.caption(fig, "many words " * 30)
    fig.draw_without_rendering()
    assert axes[1].get_tightbbox().y0 > fig.texts[-1].get_window_extent().y1


def test_names_and_experts_keep_apart():
    few = style.colours(["MoEE", "dense", "MoEE", "static"])
    assert few == {"MoEE": style.PALETTE[0], "dense": style.GREY, "static": style.PALETTE[1]}
    assert len(set(style.colours(map(str, range(12))).values())) == 12
    assert len(set(style.expert_colours(28))) == 28
    assert style.expert_colours(40)[:9] == style.expert_colours(9)
    assert len(style.expert_colours(40)) == 40


def test_names_are_no_formulas():
    names = ["$\\frac$", "$x$", "a$b"]

    @style.house
    def drawn():
        fig, ax = style.figure(4, 3)
        ax.set_xticks(range(3), names)
        return style.caption(fig, ", ".join(names))

    fig = drawn()
    fig.canvas.draw()
    labels = fig.axes[0].get_xticklabels()
    assert words(labels) == names
    assert not any(text.get_parse_math() for text in labels)


def plain(colour, *, width=2.0, height=1.0):
    fig, ax = style.figure(width, height, layout="none")
    fig.patch.set_facecolor(colour)
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ax.imshow(np.full((1, 1, 3), to_rgb(colour)), aspect="auto")
    return fig


def middle_colours(fig, rows, columns):
    """Colour in the middle of each place of a grid, (rows, columns, 3)."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]
    down, across = (
        ((np.arange(n) + 0.45) * size / n).astype(int)
        for n, size in zip((rows, columns), image.shape[:2], strict=True)
    )
    return image[np.ix_(down, across)] / 255


def test_figures_on_a_sheet_stand_side_by_side_in_their_order():
    fig = drawing.sheet([plain(colour) for colour in (RED, GREEN, BLUE)])
    np.testing.assert_array_equal(middle_colours(fig, 1, 3)[0], np.eye(3))


def test_figures_that_do_not_fit_beside_the_others_go_below_in_even_lines():
    wide = drawing.WIDTH / 3.5
    fig = drawing.sheet([plain(colour, width=wide) for colour in (RED, RED, RED, BLUE)])
    np.testing.assert_array_equal(middle_colours(fig, 2, 2)[1], np.eye(3)[[0, 2]])


def test_a_caption_of_a_sheet_gets_room_of_its_own_and_no_figure_is_refused():
    figures = [plain(RED)]
    told = drawing.sheet(figures, caption="told")
    assert told.get_figheight() > drawing.sheet(figures).get_figheight()
    with pytest.raises(MoeeError, match="figures"):
        drawing.sheet([])
