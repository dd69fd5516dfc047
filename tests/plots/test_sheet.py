from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moee_analysis.errors import MoeeError
from moee_analysis.plots import style
from moee_analysis.plots.sheet import WIDTH, sheet


def plain(colour, *, width=2.0, height=1.0):
    fig, ax = style.figure(width, height, layout="none")
    fig.patch.set_facecolor(colour)
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    ax.imshow(np.full((1, 1, 3), style.mpl.colors.to_rgb(colour)), aspect="auto")
    return fig


def pixels(fig):
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def middle_colours(fig, rows, columns):
    """Colour in the middle of each place of a grid."""
    image = pixels(fig)
    height, width = image.shape[:2]
    return [
        [tuple(image[int((r + 0.45) * height / rows), int((c + 0.45) * width / columns)])
         for c in range(columns)]
        for r in range(rows)
    ]  # fmt: skip


def test_figures_stand_side_by_side_in_their_order():
    fig = sheet([plain("#ff0000"), plain("#00ff00"), plain("#0000ff")])
    assert middle_colours(fig, 1, 3) == [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]]


def test_what_does_not_fit_beside_the_others_goes_below_in_even_lines():
    wide = WIDTH / 3.5
    fig = sheet([plain("#ff0000", width=wide) for _ in range(3)] + [plain("#0000ff", width=wide)])
    assert middle_colours(fig, 2, 2)[1] == [(255, 0, 0), (0, 0, 255)]


def test_a_caption_gets_room_of_its_own():
    figures = [plain("#ff0000")]
    assert sheet(figures, caption="told").get_figheight() > sheet(figures).get_figheight()


def test_no_figure_is_refused():
    with pytest.raises(MoeeError, match="figures"):
        sheet([])
