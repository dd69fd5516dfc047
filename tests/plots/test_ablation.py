from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from moee_analysis import plots
from moee_analysis.plots import style

PIECES = {"order": ("variance", "obs"), "refit": ("none", "shared"), "clustering": ("a", "b of c")}
KL = {"as it is": 0.04, "order": 0.1, "refit": 0.2, "clustering": 0.03, "control": 0.4}
BLUE, RED = style.PALETTE[:2]


def numbers(kl, *, change=math.nan):
    """Numbers of one variant, its interval and that of its change of the given half widths."""
    return {
        "retention": 1 - kl, "kl": kl, "kl_low": 0.8 * kl, "kl_high": 1.3 * kl,
        "kl_change": change, "kl_change_low": change - 0.02, "kl_change_high": change + 0.02,
        "macs_reduction": 0.36, "reason": "",
    }  # fmt: skip


def row(recipe, piece, value, direction, kl):
    change = kl - KL["as it is"]
    told = {"recipe": recipe, "piece": piece, "value": value, "direction": direction}
    return told | numbers(kl, change=change)


def table_of(recipes=("best", "paper")):
    rows = [row("", "", "dense", "as it is", 1e-9)]
    for recipe, direction, place in zip(recipes, ("off in turn", "on alone"), (0, 1), strict=False):
        rows.append(row(recipe, "", "", "as it is", KL["as it is"]))
        rows += [row(recipe, p, PIECES[p][place], direction, KL[p]) for p in PIECES]
        rows.append(row(recipe, "router", "random routing", "control", KL["control"]))
        rows.append(row(recipe, "experts", "static pruning", "control", 0.05))
    rows.append(row("best", "seed", "1", "another seed", 0.05))
    return pd.DataFrame(rows)


def sweep_row(sweep, setting, kl, *, system="MoEE", recipe="best", **others):
    told = {"system": system, "sweep": sweep, "setting": setting, "recipe": recipe}
    return told | numbers(kl) | others


def swept_table():
    rows = [sweep_row("experts", n, 0.2 / n) for n in (1, 2, 8)]
    rows += [
        sweep_row("p (paper)", p, 3 - p / 40, recipe="paper", macs_reduction=0.5 - p / 400)
        for p in (50, 70, 90)
    ]
    rows += [sweep_row("noise (paper)", n, 0.5, recipe="paper") for n in ("reroute", "drop")]
    rows += [
        sweep_row("router", n, 0.1 + i / 10, recipe="") for i, n in enumerate(("cosine", "oracle"))
    ]
    static = {"system": "static", "recipe": "best"}
    rows += [sweep_row(name, None, 0.3, **static) for name in ("experts", "router")]
    rows += [
        sweep_row("p (paper)", p, 4 - p / 40, macs_reduction=0.4 - p / 400, **static)
        for p in (50, 70, 90)
    ]
    table = pd.DataFrame(rows)
    table["setting"] = pd.Series([r["setting"] for r in rows], dtype=object)
    return table


def regret_table(routers=("cosine", "random", "oracle")):
    rows = [
        {"layer": layer, "router": name, "error": 0.1 + place * 0.1, "regret": regret}
        for layer in (0, 1, 2)
        for place, name in enumerate(routers)
        for regret in [0.0 if name == "oracle" else 0.05 * (1 + place)]
    ]
    return pd.DataFrame(rows)


def both_tables():
    return pd.concat([table_of(), swept_table()], ignore_index=True)


def titles(fig):
    return [ax.get_title(loc="left") for ax in fig.axes]


def panel(fig, title):
    return fig.axes[titles(fig).index(title)]


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def dots(ax):
    """Places of the dots and squares of a panel of rows, by row."""
    drawn = [c for c in ax.collections if isinstance(c, PathCollection)]
    return {round(y): x for c in drawn for x, y in np.asarray(c.get_offsets())}


def bars(ax):
    """Ends of the horizontal intervals of a panel, by row."""
    segments = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    return {round(s[0, 1]): tuple(s[:, 0]) for s in segments}


def legend(fig):
    return [text.get_text() for one in fig.legends for text in one.get_texts()]


def overlapping(fig, texts):
    fig.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


FIGURES = {
    "ablation": lambda: plots.ablation(table_of(), caption="words " * 40),
    "all": lambda: plots.ablation(both_tables(), regret=regret_table(), caption="words " * 40),
    "sweeps": lambda: plots.sweeps(swept_table(), caption="words " * 40),
    "regret": lambda: plots.router_regret(regret_table(), caption="words " * 40),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=list(FIGURES))
def test_figures_are_closed_and_the_caption_stands_below_everything(draw):
    fig = draw()
    assert plt.get_fignums() == []
    fig.draw_without_rendering()
    top = fig.texts[-1].get_window_extent().y1
    assert all(ax.get_tightbbox().y0 > top for ax in fig.axes)
    assert all(
        0 <= ax.get_tightbbox().x0 < ax.get_tightbbox().x1 <= fig.bbox.width for ax in fig.axes
    )
    assert fig.legends[0].get_window_extent().x1 <= fig.bbox.width


@pytest.mark.parametrize("draw", FIGURES.values(), ids=list(FIGURES))
def test_no_labels_touch(draw):
    fig = draw()
    fig.draw_without_rendering()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            assert not overlapping(fig, [t.label1 for t in ticks if t.label1.get_visible()])
    shown = [ax.title for ax in fig.axes] + [ax._left_title for ax in fig.axes]
    assert not overlapping(fig, [*shown, *(t for ax in fig.axes for t in ax.texts)])


def test_every_axis_says_what_it_shows():
    fig = plots.ablation(both_tables(), regret=regret_table())
    off, on, experts, over_macs, noise, router, regret = fig.axes
    assert all("KL" in ax.get_xlabel() and "nats" in ax.get_xlabel() for ax in (off, on))
    assert "KL" in experts.get_ylabel()
    assert experts.get_shared_y_axes().joined(experts, over_macs)
    assert "MACs" in over_macs.get_xlabel()
    assert noise.get_xlabel() == router.get_xlabel() == "KL, nats"
    assert (regret.get_xlabel(), regret.get_ylabel()[0]) == ("layer", "%")
    left, right = plots.router_regret(regret_table()).axes
    assert "%" in left.get_ylabel()
    assert "layer" in left.figure.get_supxlabel()
    assert "regret" in right.get_title(loc="left")


def test_rows_are_sorted_by_effect_and_controls_stand_last():
    fig = plots.ablation(table_of())
    assert titles(fig) == ["“best”, one piece off", "“paper”, one piece added"]
    off, on = fig.axes
    assert names_of(off) == [
        "as it is", "refit: none", "order: variance", "clustering: a", "static pruning",
        "random routing",
    ]  # fmt: skip
    assert names_of(on)[1:4] == ["clustering: b of c", "order: obs", "refit: shared"]
    expected = [KL["as it is"], KL["refit"], KL["order"], KL["clustering"], 0.05, KL["control"]]
    assert [dots(off)[row] for row in range(6)] == pytest.approx(expected)
    for row_number, kl in enumerate(expected):
        assert bars(off)[row_number] == pytest.approx((0.8 * kl, 1.3 * kl))


def test_lines_are_the_recipe_and_its_other_seeds():
    off, on = plots.ablation(table_of()).axes
    assert [line.get_xdata()[0] for line in off.lines[:2]] == [0.04, 0.05]
    assert off.lines[0].get_linewidth() > off.lines[1].get_linewidth()
    assert on.lines[0].get_xdata()[0] == 0.04
    assert off.lines[0].get_color() == BLUE
    assert on.lines[0].get_color() == RED


def test_hollow_dots_may_be_chance():
    off = plots.ablation(table_of()).axes[0]
    dots_of, squares = (c for c in off.collections if isinstance(c, PathCollection))
    faces = [to_hex(face, keep_alpha=False) for face in dots_of.get_facecolor()]
    # by rows: as it is, refit, order, clustering; only the last changes by less than its interval
    assert faces == [BLUE.lower(), BLUE.lower(), BLUE.lower(), "#ffffff"]
    held = [to_hex(face, keep_alpha=False) for face in squares.get_facecolor()]
    assert held == ["#ffffff", style.INK.lower()]


def test_retention_stands_beside_each_row():
    off = plots.ablation(table_of()).axes[0]
    written = [text.get_text() for text in off.texts]
    assert written == ["96.0", "80.0", "90.0", "97.0", "95.0", "60.0", "top-1 kept, %"]


def test_a_variant_that_cannot_be_has_an_empty_row():
    table = table_of()
    missing = (table["piece"] == "order") & (table["recipe"] == "best")
    table.loc[missing, list(numbers(0.1))] = math.nan
    off = plots.ablation(table).axes[0]
    assert names_of(off)[3] == "order: variance"
    assert "no such model, see the table" in [text.get_text() for text in off.texts]
    assert 3 not in {y for y, x in dots(off).items() if np.isfinite(x)}


def test_the_legend_names_only_what_is_there():
    full = legend(plots.ablation(table_of()))
    assert full == [
        "as it is", "another seed", "changed", "changed, but perhaps by chance", "control",
    ]  # fmt: skip
    plain = table_of()[lambda t: ~t["direction"].isin(["another seed", "control"])]
    assert legend(plots.ablation(plain)) == [full[0], full[2], full[3]]
    assert legend(plots.ablation(both_tables()))[-1] == "static"
    assert legend(plots.sweeps(swept_table())) == ["MoEE", "static"]


def test_sweeps_and_regret_get_panels_below_the_pieces():
    fig = plots.ablation(both_tables(), regret=regret_table())
    assert titles(fig) == [
        "“best”, one piece off", "“paper”, one piece added", "experts",
        "p (paper)", "noise (paper)", "router", "regret of the routers",
    ]  # fmt: skip
    assert titles(plots.sweeps(swept_table())) == titles(fig)[2:-1]


def test_colours_tell_the_recipe_in_every_panel():
    fig = plots.ablation(both_tables(), regret=regret_table())
    assert panel(fig, "experts").lines[-1].get_color() == BLUE
    assert panel(fig, "p (paper)").lines[0].get_color() == RED
    noise = panel(fig, "noise (paper)").collections
    assert {to_hex(c.get_facecolor()[0]) for c in noise if len(c.get_facecolor())} >= {RED.lower()}


def test_numbers_are_curves_with_intervals():
    ax = panel(plots.sweeps(swept_table()), "experts")
    level, curve = ax.lines
    assert list(level.get_ydata()) == [0.3, 0.3]
    np.testing.assert_allclose(curve.get_xydata(), [(1, 0.2), (2, 0.1), (8, 0.025)])
    (intervals,) = [c for c in ax.collections if hasattr(c, "get_segments")]
    assert [tuple(s[:, 1]) for s in intervals.get_segments()] == [
        pytest.approx((0.8 * kl, 1.3 * kl)) for kl in (0.2, 0.1, 0.025)
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "8"]


def test_settings_of_different_macs_stand_over_the_macs():
    ax = panel(plots.sweeps(swept_table()), "p (paper)")
    own, static = ax.lines
    macs = [100 * (0.5 + p / 400) for p in (50, 70, 90)]
    assert sorted(own.get_xdata()) == pytest.approx(macs)
    assert sorted(static.get_xdata()) == pytest.approx([m + 10 for m in macs])
    assert {text.get_text() for text in ax.texts} == {"50", "70", "90"}
    assert "MACs" in ax.get_xlabel()
    assert static.get_linestyle() == "--"


def test_names_are_rows_with_dots_and_the_control_a_band():
    ax = panel(plots.sweeps(swept_table()), "router")
    assert names_of(ax) == ["cosine", "oracle"]
    assert dots(ax) == pytest.approx({0: 0.1, 1: 0.2})
    assert bars(ax)[1] == pytest.approx((0.16, 0.26))
    assert list(ax.lines[0].get_xdata()) == [0.3, 0.3]


def test_all_sweeps_have_one_scale():
    fig = plots.sweeps(swept_table())
    limits = {ax.get_ylim() for ax in fig.axes[:2]} | {ax.get_xlim() for ax in fig.axes[2:]}
    assert len(limits) == 1
    (low, high) = limits.pop()
    known = swept_table()
    assert low < known["kl_low"].min()
    assert high > known["kl_high"].max()


def test_routers_look_the_same_in_rows_and_in_their_regret():
    fig = plots.sweeps(swept_table(), regret=regret_table())
    rows, lines = fig.axes[-2:]
    first = next(c for c in rows.collections if isinstance(c, PathCollection))
    assert to_hex(first.get_facecolor()[0]) == to_hex(lines.lines[0].get_color())


def test_more_sweeps_than_a_row_holds_begin_another():
    rows = [sweep_row(f"s{n}", name, 0.1) for n in range(5) for name in ("a", "b")]
    rows += [sweep_row(f"n{n}", number, 0.1) for n in range(4) for number in (1, 2)]
    fig = plots.sweeps(pd.DataFrame(rows).astype({"setting": object}))
    assert titles(fig) == ["n0", "n1", "n2", "n3", "s0", "s1", "s2", "s3", "s4"]
    assert fig.axes[3].get_position().x0 == pytest.approx(fig.axes[0].get_position().x0, abs=0.1)


def test_a_sweep_without_any_model_has_empty_panels():
    table = swept_table()
    table.loc[:, ["kl", "kl_low", "kl_high", "macs_reduction"]] = math.nan
    assert len(plots.sweeps(table).axes) == 4


def test_regret_draws_every_router_left_and_all_but_the_oracle_right():
    fig = plots.router_regret(regret_table())
    left, right = fig.axes
    assert legend(fig) == ["cosine", "random", "oracle"]
    assert [list(line.get_ydata()) for line in left.lines] == [
        pytest.approx([100 * (0.1 + 0.1 * place)] * 3) for place in range(3)
    ]
    assert [list(line.get_ydata()) for line in right.lines] == [
        pytest.approx([5.0] * 3), pytest.approx([10.0] * 3),
    ]  # fmt: skip
    looks = [(line.get_color(), line.get_marker()) for line in left.lines]
    assert len(set(looks)) == 3
    assert looks[:2] == [(line.get_color(), line.get_marker()) for line in right.lines]
    assert "%" in left.get_ylabel()


def test_ones_own_caption_or_the_table_s():
    table, swept, regret = table_of(), swept_table(), regret_table()
    for draw, drawn in (
        (plots.ablation, table),
        (plots.sweeps, swept),
        (plots.router_regret, regret),
    ):
        assert draw(drawn, caption="On the scenes.").texts[-1].get_text() == "On the scenes."
        drawn.attrs["caption"] = "As measured."
        assert draw(drawn).texts[-1].get_text() == "As measured."
