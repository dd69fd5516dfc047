import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from moee_analysis import plots
from moee_analysis.plots import style
from tests.helpers.plot_tables import TABLES, figure_of, legend, panel, sweep_table, titles, words

BLUE, RED = (colour.lower() for colour in style.PALETTE[:2])
BOTH = TABLES["ablation"]
PIECES, SWEPT = BOTH[BOTH["sweep"].isna()], BOTH[BOTH["sweep"].notna()]
REGRET = pd.DataFrame(
    {"layer": layer, "router": name, "error": 0.1, "regret": regret}
    for layer in (0, 1, 2)
    for name, regret in (("cosine", 0.05), ("random", 0.1), ("oracle", 0.0))
)


@pytest.fixture(scope="module")
def whole():
    return plots.ablation(BOTH, regret=REGRET, caption="words " * 40)


def marks(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection)]


def dots(ax):
    """Places of the dots and squares of a panel of rows, by row."""
    return {round(y): x for c in marks(ax) for x, y in np.asarray(c.get_offsets())}


def hexes(colours):
    return [to_hex(colour, keep_alpha=False) for colour in colours]


def test_every_axis_has_its_names_and_nothing_touches(whole):
    off, on, experts, over_macs, noise, router, regret = whole.axes
    assert titles(whole.axes) == [
        "“best”, one piece off", "“paper”, one piece added", "experts",
        "p (paper)", "noise (paper)", "router", "regret of the routers",
    ]  # fmt: skip
    assert all("KL" in ax.get_xlabel() and "nats" in ax.get_xlabel() for ax in (off, on))
    assert "KL" in experts.get_ylabel()
    assert experts.get_shared_y_axes().joined(experts, over_macs)
    assert "MACs" in over_macs.get_xlabel()
    assert noise.get_xlabel() == router.get_xlabel() == "KL, nats"
    assert (regret.get_xlabel(), regret.get_ylabel()[0]) == ("layer", "%")
    whole.draw_without_rendering()
    top = whole.texts[-1].get_window_extent().y1
    for ax in whole.axes:
        box = ax.get_tightbbox()
        assert (box.y0 > top, box.x0 >= 0, box.x1 <= whole.bbox.width) == (True, True, True)
    assert whole.legends[0].get_window_extent().x1 <= whole.bbox.width
    labels = [label for ax in whole.axes for label in (ax._left_title, *ax.texts)]
    labels += [axis.label for ax in whole.axes for axis in (ax.xaxis, ax.yaxis)]
    boxes = [text.get_window_extent() for text in labels if text.get_text()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_shares_of_the_dense_top_1_stand_beside_the_bars_however_long_they_are():
    fig = plots.ablation(PIECES.assign(retention=1.044, kl_high=10.0))
    fig.draw_without_rendering()
    for ax in fig.axes:
        *numbers, _ = ax.texts
        assert {number.get_text() for number in numbers} == {"104.4"}
        assert all(number.get_window_extent().x0 > ax.bbox.x1 for number in numbers)


def test_a_variant_that_cannot_be_has_an_empty_row():
    missing = (PIECES["piece"] == "order") & (PIECES["recipe"] == "best")
    numbers = PIECES.select_dtypes("float").columns
    off = plots.ablation(PIECES.assign(**PIECES[numbers].mask(missing))).axes[0]
    assert words(off.get_yticklabels())[3] == "order: variance"
    assert "no such model, see the table" in words(off.texts)
    assert 3 not in {y for y, x in dots(off).items() if np.isfinite(x)}


def test_the_legend_names_only_what_is_there(whole):
    *full, other = legend(whole)
    plain = PIECES[~PIECES["direction"].isin(["another seed", "control"])]
    assert legend(plots.ablation(plain)) == [full[0], full[2], full[3]]
    assert other == "static"


def test_colours_tell_recipes_and_routers_in_every_panel(whole):
    assert panel(whole, "experts").lines[1].get_color().lower() == BLUE
    assert panel(whole, "p (paper)").lines[0].get_color().lower() == RED
    assert RED in [hexes(c.get_facecolor())[0] for c in marks(panel(whole, "noise (paper)"))]
    rows, regret = whole.axes[-2:]
    assert hexes(marks(rows)[0].get_facecolor()) == hexes([regret.lines[0].get_color()])


def test_all_sweeps_have_one_scale():
    axes = figure_of("ablation").axes[2:]
    ((low, high),) = {ax.get_ylim() for ax in axes[:2]} | {ax.get_xlim() for ax in axes[2:]}
    assert low < SWEPT["kl_low"].min()
    assert high > SWEPT["kl_high"].max()


def test_sweeps_alone_are_drawn_and_told():
    alone = SWEPT.drop(columns=["direction", "piece", "value"], errors="ignore")
    fig = plots.ablation(alone)
    assert titles(fig.axes) == titles(figure_of("ablation").axes[2:])
    assert plots.describe(plots.ablation, alone).startswith(
        "Lowest KL divergence, in nats: experts:"
    )


def test_more_sweeps_than_a_row_holds_begin_another():
    rows = [(f"s{n}", name, 0.1, "MoEE", "best", 0.36) for n in range(5) for name in ("a", "b")]
    rows += [(f"n{n}", number, 0.1, "MoEE", "best", 0.36) for n in range(4) for number in (1, 2)]
    axes = plots.ablation(pd.concat([PIECES, sweep_table(*rows)], ignore_index=True)).axes[2:]
    assert titles(axes) == ["n0", "n1", "n2", "n3", "s0", "s1", "s2", "s3", "s4"]
    assert axes[3].get_position().x0 == pytest.approx(axes[0].get_position().x0, abs=0.1)


def test_a_sweep_without_any_model_has_empty_panels():
    unknown = dict.fromkeys(["kl", "kl_low", "kl_high", "macs_reduction"], math.nan)
    both = pd.concat([PIECES, SWEPT.assign(**unknown)], ignore_index=True)
    assert len(plots.ablation(both).axes) == 2 + 4
