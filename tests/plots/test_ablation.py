from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from moee_analysis import plots
from moee_analysis.plots import style
from tests.helpers.plot_tables import legend, lines, panel

PIECES = {"order": ("variance", "obs"), "refit": ("none", "shared"), "clustering": ("a", "b of c")}
KL = {"as it is": 0.04, "order": 0.1, "refit": 0.2, "clustering": 0.03, "control": 0.4}
BLUE, RED = (colour.lower() for colour in style.PALETTE[:2])


def numbers(kl, *, change=math.nan):
    """Numbers of one variant, its interval and that of its change of the given half widths."""
    return {
        "retention": 1 - kl, "kl": kl, "kl_low": 0.8 * kl, "kl_high": 1.3 * kl,
        "kl_change": change, "kl_change_low": change - 0.02, "kl_change_high": change + 0.02,
        "macs_reduction": 0.36, "reason": "",
    }  # fmt: skip


def pieces(recipes=("best", "paper")):
    rows = [("", "", "dense", "as it is", 1e-9)]
    for recipe, direction, place in zip(recipes, ("off in turn", "on alone"), (0, 1), strict=False):
        rows.append((recipe, "", "", "as it is", KL["as it is"]))
        rows += [(recipe, p, PIECES[p][place], direction, KL[p]) for p in PIECES]
        rows.append((recipe, "router", "random routing", "control", KL["control"]))
        rows.append((recipe, "experts", "static pruning", "control", 0.05))
    rows.append(("best", "seed", "1", "another seed", 0.05))
    names = ("recipe", "piece", "value", "direction")
    return pd.DataFrame(
        dict(zip(names, row, strict=False)) | numbers(row[-1], change=row[-1] - KL["as it is"])
        for row in rows
    )


def swept(rows=None):
    """Sweep, setting, divergence, system, recipe and MACs saved."""
    static = ("static", "best")
    rows = rows or [
        *(("experts", n, 0.2 / n, "MoEE", "best", 0.36) for n in (1, 2, 8)),
        *(("p (paper)", p, 3 - p / 40, "MoEE", "paper", 0.5 - p / 400) for p in (50, 70, 90)),
        *(("noise (paper)", n, 0.5, "MoEE", "paper", 0.36) for n in ("reroute", "drop")),
        *(("router", n, kl, "MoEE", "", 0.36) for n, kl in (("cosine", 0.1), ("oracle", 0.2))),
        *((name, None, 0.3, *static, 0.36) for name in ("experts", "router")),
        *(("p (paper)", p, 4 - p / 40, *static, 0.4 - p / 400) for p in (50, 70, 90)),
    ]
    names = ("sweep", "setting", "kl", "system", "recipe", "macs_reduction")
    table = pd.DataFrame([numbers(row[2]) | dict(zip(names, row, strict=True)) for row in rows])
    return table.assign(setting=pd.Series([row[1] for row in rows], dtype=object))


REGRET = pd.DataFrame(
    {"layer": layer, "router": name, "error": 0.1, "regret": regret}
    for layer in (0, 1, 2)
    for name, regret in (("cosine", 0.05), ("random", 0.1), ("oracle", 0.0))
)
BOTH = pd.concat([pieces(), swept()], ignore_index=True)


@pytest.fixture(scope="module")
def whole():
    return plots.ablation(BOTH, regret=REGRET, caption="words " * 40)


@pytest.fixture(scope="module")
def off_and_on():
    return plots.ablation(pieces()).axes


@pytest.fixture(scope="module")
def sweeps():
    return plots.sweeps(swept())


def titles(fig):
    return [ax.get_title(loc="left") for ax in fig.axes]


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def marks(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection)]


def dots(ax):
    """Places of the dots and squares of a panel of rows, by row."""
    return {round(y): x for c in marks(ax) for x, y in np.asarray(c.get_offsets())}


def bars(ax):
    """Ends of the horizontal intervals of a panel, by row."""
    segments = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    return {round(s[0, 1]): tuple(s[:, 0]) for s in segments}


def test_every_axis_says_what_it_shows_and_nothing_touches(whole):
    off, on, experts, over_macs, noise, router, regret = whole.axes
    assert titles(whole) == [
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
    texts = [t for ax in whole.axes for t in (ax._left_title, *ax.texts) if t.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_rows_are_sorted_by_effect_and_controls_stand_last(off_and_on):
    off, on = off_and_on
    assert names_of(off) == [
        "as it is", "refit: none", "order: variance", "clustering: a", "static pruning",
        "random routing",
    ]  # fmt: skip
    assert names_of(on)[1:4] == ["clustering: b of c", "order: obs", "refit: shared"]
    expected = [KL["as it is"], KL["refit"], KL["order"], KL["clustering"], 0.05, KL["control"]]
    assert [dots(off)[row] for row in range(6)] == pytest.approx(expected)
    for row, kl in enumerate(expected):
        assert bars(off)[row] == pytest.approx((0.8 * kl, 1.3 * kl))
    written = [text.get_text() for text in off.texts]
    assert written == ["96.0", "80.0", "90.0", "97.0", "95.0", "60.0", "top-1 kept, %"]


def test_lines_are_the_recipe_and_its_other_seeds(off_and_on):
    off, on = off_and_on
    assert [line.get_xdata()[0] for line in off.lines[:2]] == [0.04, 0.05]
    assert off.lines[0].get_linewidth() > off.lines[1].get_linewidth()
    assert on.lines[0].get_xdata()[0] == 0.04
    assert [ax.lines[0].get_color().lower() for ax in (off, on)] == [BLUE, RED]


def test_hollow_dots_may_be_chance(off_and_on):
    circles, squares = marks(off_and_on[0])
    faces = [to_hex(face, keep_alpha=False) for face in circles.get_facecolor()]
    # by rows: as it is, refit, order, clustering; only the last changes by less than its interval
    assert faces == [BLUE, BLUE, BLUE, "#ffffff"]
    held = [to_hex(face, keep_alpha=False) for face in squares.get_facecolor()]
    assert held == ["#ffffff", style.INK.lower()]


def test_a_variant_that_cannot_be_has_an_empty_row():
    table = pieces()
    missing = (table["piece"] == "order") & (table["recipe"] == "best")
    table.loc[missing, list(numbers(0.1))] = math.nan
    off = plots.ablation(table).axes[0]
    assert names_of(off)[3] == "order: variance"
    assert "no such model, see the table" in [text.get_text() for text in off.texts]
    assert 3 not in {y for y, x in dots(off).items() if np.isfinite(x)}


def test_the_legend_names_only_what_is_there(whole, off_and_on, sweeps):
    full = legend(off_and_on[0].figure.figure)
    assert full == [
        "as it is", "another seed", "changed", "changed, but perhaps by chance", "control",
    ]  # fmt: skip
    plain = pieces()[lambda t: ~t["direction"].isin(["another seed", "control"])]
    assert legend(plots.ablation(plain)) == [full[0], full[2], full[3]]
    assert legend(whole)[-1] == "static"
    assert legend(sweeps) == ["MoEE", "static"]


def test_colours_tell_the_recipe_in_every_panel(whole):
    assert panel(whole, "experts").lines[1].get_color().lower() == BLUE
    assert panel(whole, "p (paper)").lines[0].get_color().lower() == RED
    faces = [to_hex(c.get_facecolor()[0]) for c in marks(panel(whole, "noise (paper)"))]
    assert RED in faces


def test_numbers_are_curves_with_intervals(sweeps):
    assert titles(sweeps) == ["experts", "p (paper)", "noise (paper)", "router"]
    ax = panel(sweeps, "experts")
    level, curve = ax.lines[:2]
    assert list(level.get_ydata()) == [0.3, 0.3]
    np.testing.assert_allclose(curve.get_xydata(), [(1, 0.2), (2, 0.1), (8, 0.025)])
    segments = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert [tuple(s[:, 1]) for s in segments] == [
        pytest.approx((0.8 * kl, 1.3 * kl)) for kl in (0.2, 0.1, 0.025)
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "8"]


def test_settings_of_different_macs_stand_over_the_macs(sweeps):
    ax = panel(sweeps, "p (paper)")
    own, static = ax.lines
    macs = [100 * (0.5 + p / 400) for p in (50, 70, 90)]
    assert sorted(own.get_xdata()) == pytest.approx(macs)
    assert sorted(static.get_xdata()) == pytest.approx([m + 10 for m in macs])
    assert {text.get_text() for text in ax.texts} == {"50", "70", "90"}
    assert static.get_linestyle() == "--"


def test_names_are_rows_with_dots_and_the_control_a_band(sweeps):
    ax = panel(sweeps, "router")
    assert names_of(ax) == ["cosine", "oracle"]
    assert dots(ax) == pytest.approx({0: 0.1, 1: 0.2})
    assert bars(ax)[1] == pytest.approx((0.16, 0.26))
    assert lines(ax)[0][0][0] == 0.3


def test_all_sweeps_have_one_scale(sweeps):
    limits = {ax.get_ylim() for ax in sweeps.axes[:2]} | {ax.get_xlim() for ax in sweeps.axes[2:]}
    assert len(limits) == 1
    (low, high) = limits.pop()
    assert low < swept()["kl_low"].min()
    assert high > swept()["kl_high"].max()


def test_routers_look_the_same_in_rows_and_in_their_regret(whole):
    rows, regret = whole.axes[-2:]
    assert to_hex(marks(rows)[0].get_facecolor()[0]) == to_hex(regret.lines[0].get_color())


def test_more_sweeps_than_a_row_holds_begin_another():
    rows = [(f"s{n}", name, 0.1, "MoEE", "best", 0.36) for n in range(5) for name in ("a", "b")]
    rows += [(f"n{n}", number, 0.1, "MoEE", "best", 0.36) for n in range(4) for number in (1, 2)]
    fig = plots.sweeps(swept(rows))
    assert titles(fig) == ["n0", "n1", "n2", "n3", "s0", "s1", "s2", "s3", "s4"]
    assert fig.axes[3].get_position().x0 == pytest.approx(fig.axes[0].get_position().x0, abs=0.1)


def test_a_sweep_without_any_model_has_empty_panels():
    table = swept()
    table.loc[:, ["kl", "kl_low", "kl_high", "macs_reduction"]] = math.nan
    assert len(plots.sweeps(table).axes) == 4
