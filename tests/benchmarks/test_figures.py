import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from figures import clustering_time, extraction_time, fidelity, inference, kl_against_time

from moee_analysis.plots import style

NAN = math.nan
BUDGETS = [(0.2, NAN), (0.28, NAN), (0.36, NAN), (0.29, 0.2), (0.29, 0.18), (0.36, 0.32)]
FAMILIES = {"magnitude": "static", "variance": "static", "best": "experts", "random": "controls"}
ROUTED = {"static pruning": 1.39, "best": 1.41}


def fidelity_table(budgets=BUDGETS):
    columns = ["system", "family", "macs_asked", "params_asked", "retention"]
    rows = [
        (system, family, macs, params, 0.9 - macs / 10 - 0.1 * place)
        for place, (system, family) in enumerate(FAMILIES.items())
        for macs, params in budgets
    ]
    table = pd.DataFrame(rows, columns=columns).assign(macs_reduction=lambda t: t.macs_asked + 1e-3)
    table = table.assign(kl=1 - table.retention, kl_error=0.01)
    return table.assign(retention_low=table.retention - 0.05, retention_high=table.retention + 0.02)


def inference_table(threads=(1, 2)):
    columns = ["system", "batch", "threads", "promised", "speedup", "speedup_low", "speedup_high"]
    rows = [
        (name, batch, count, ROUTED.get(name, 1.0), 1.4 - 0.1 / batch, 1.4 - 0.2 / batch,
         1.4 + 0.1 / count)
        for count in threads for batch in (1, 8, 64) for name in ("dense", *ROUTED)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def clustering_table():
    rows = [(name, n, n / 1e3, 1.5, 1.2) for name in ("ours", "theirs") for n in (1000, 2500)]
    columns = ["system", "tokens", "seconds", "peak_gb", "exponent"]
    return pd.DataFrame([*rows, ("new", 1000, 1.0, 2.0, NAN)], columns=columns)


def extraction_table():
    rows = [
        ("best", 100, "recording", 3.0), ("best", 100, "other", 1.0),
        ("best", 200, "recording", 2.5), ("best", 200, "refit", 0.5), ("paper", 100, "other", 9),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["recipe", "images", "stage", "passes"])


FIGURES = [
    (fidelity, fidelity_table), (inference, inference_table), (clustering_time, clustering_table),
    (extraction_time, extraction_table),
]  # fmt: skip


def systems_drawn(ax):
    """What is drawn of each system, in the order of the table."""
    return [line for line in ax.lines if line.get_marker() != "None"]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("plot", "make"), FIGURES)
def test_neither_legend_nor_labels_touch_and_captions_are_one_s_own(plot, make):
    figure = plot(make(), caption="many words " * 30)
    figure.draw_without_rendering()
    caption = next(text for text in figure.texts if text.get_text().startswith("many"))
    for ax in figure.axes:
        assert ax.xaxis.label.get_window_extent().y0 > caption.get_window_extent().y1
        if figure.legends:
            assert ax.get_tightbbox().x1 <= figure.legends[0].get_window_extent().x0
            assert figure.legends[0].get_window_extent().x1 <= figure.bbox.width
    for left, right in pairwise(ax.xaxis.label.get_window_extent() for ax in figure.axes):
        assert left.x1 < right.x0
    table = make()
    table.attrs["caption"] = "As measured."
    assert plot(table).texts[-1].get_text() == "As measured."


# Fidelity


def test_a_line_and_its_intervals_for_every_system_in_every_panel():
    table = fidelity_table()
    divergence, free, bound = fidelity(table).axes
    for ax, chosen in (
        (free, table["params_asked"].isna()), (bound, table["params_asked"].notna()),
    ):  # fmt: skip
        for system, line in zip(FAMILIES, systems_drawn(ax), strict=True):
            rows = table[chosen & (table["system"] == system)]
            assert sorted(line.get_ydata()) == pytest.approx(sorted(100 * rows["retention"]))
            assert (np.diff(line.get_xdata()) > 0).all()
        assert list(ax.lines[-1].get_ydata()) == [100, 100]
    for system, line in zip(FAMILIES, systems_drawn(divergence), strict=True):
        rows = table[table["params_asked"].isna() & (table["system"] == system)]
        assert line.get_ydata() == pytest.approx(rows["kl"])
    reach = np.diff(divergence.collections[0].get_segments()[0][:, 1])
    assert reach == pytest.approx(2 * 1.96 * 0.01)
    assert "%" in free.get_xlabel()
    for line in systems_drawn(free):
        assert line.get_xdata() == pytest.approx([20.1, 28.1, 36.1], abs=0.5)
    drawn = [segment[:, 1] for segment in free.collections[0].get_segments()]
    rows = table[(table["system"] == "magnitude") & table["params_asked"].isna()]
    assert drawn == pytest.approx(100 * rows[["retention_low", "retention_high"]].to_numpy())
    names = [label.get_text() for label in bound.get_xticklabels()]
    assert names == ["−29 %\n−18 %", "−29 %\n−20 %", "−36 %\n−32 %"]


def test_no_two_systems_look_alike_and_families_share_a_line_and_a_heading():
    figure = fidelity(fidelity_table())
    lines = systems_drawn(figure.axes[0])
    assert len({line.get_color() for line in lines}) == len(FAMILIES)
    assert lines[0].get_linestyle() == lines[1].get_linestyle()
    assert len({line.get_linestyle() for line in lines}) == 3
    assert lines[0].get_marker() != lines[1].get_marker()
    assert legend_of(figure) == [
        "static", "magnitude", "variance", "experts", "best", "controls", "random", "dense model",
    ]  # fmt: skip


def test_systems_that_could_not_be_reached_are_left_out_and_a_budget_s_panel_too():
    table = fidelity_table()
    best = (table["system"] == "best") & table["params_asked"].notna()
    table.loc[best | (table["system"] == "random"), "retention"] = NAN
    figure = fidelity(table)
    assert [len(systems_drawn(ax)) for ax in figure.axes] == [3, 3, 2]
    assert "random" not in legend_of(figure)
    nothing = fidelity(table.assign(retention=NAN))
    assert len(nothing.axes) == 2
    assert legend_of(nothing) == ["dense model"]
    for budgets, title, panels in ((BUDGETS[:3], "free", 2), (BUDGETS[3:], "bound", 1)):
        axes = fidelity(fidelity_table(budgets=budgets)).axes
        assert len(axes) == panels
        assert all(title in ax.get_title(loc="left") for ax in axes)


# Speed-ups


def test_a_panel_for_each_number_of_threads_a_line_for_each_system_and_its_quartiles():
    table = inference_table()
    figure = inference(table)
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["1 thread", "2 threads"]
    for ax, threads in zip(figure.axes, (1, 2), strict=True):
        for system, line in zip(ROUTED, systems_drawn(ax), strict=True):
            rows = table[(table["system"] == system) & (table["threads"] == threads)]
            assert line.get_ydata() == pytest.approx(rows["speedup"].to_numpy())
            assert line.get_xdata() == pytest.approx([1, 8, 64], rel=0.2)
        quartiles = [segment[:, 1] for segment in ax.collections[-1].get_segments()]
        assert quartiles == pytest.approx(rows[["speedup_low", "speedup_high"]].to_numpy())
        levels = {line.get_linestyle(): [] for line in ax.lines}
        for line in ax.lines:
            levels[line.get_linestyle()].append(line.get_ydata()[0])
        assert levels[":"] == [1.39, 1.41]
        assert levels["-"][0] == 1
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "64"]
        assert "images" in ax.get_xlabel()
    colours = {line.get_color() for line in systems_drawn(figure.axes[0])}
    assert len(colours - {style.GREY}) == len(ROUTED)
    assert legend_of(figure) == [*ROUTED, "promised by the MACs", "dense model"]
    many = inference(inference_table(threads=(1, 2, 4, 8, 16)))
    assert len({round(ax.get_position().y0, 2) for ax in many.axes}) == 2  # rows of panels


def test_divergence_against_time_has_a_panel_for_each_batch_of_the_most_threads():
    systems = {"dense": 0.0, "best at −28 %": 0.01, "best at −45 %": 0.03, "merging": NAN}
    rows = [
        (name, engine, batch, threads, batch * (4 - place) / threads, kl)
        for threads in (1, 2) for batch in (1, 8) for engine in ("torch", "int8")
        for place, (name, kl) in enumerate(systems.items())
    ]  # fmt: skip
    columns = ["system", "engine", "batch", "threads", "ms", "kl"]
    figure = kl_against_time(pd.DataFrame(rows, columns=columns), caption="As measured.")
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["batches of 1", "batches of 8"]
    assert legend_of(figure) == ["system", "dense", "best", "engine", "torch", "int8"]
    assert figure.texts[-1].get_text() == "As measured."
    for ax in figure.axes:
        best = [line for line in ax.lines if len(line.get_xdata()) == 2]
        assert len(best) == 2  # engines, over the budgets
        for line in best:
            assert sorted(line.get_xdata()) == pytest.approx([1, 1.5])
            assert sorted(line.get_ydata()) == pytest.approx([0.01, 0.03])
        assert ax.get_tightbbox().x1 <= figure.legends[0].get_window_extent().x0


# Times


def test_clusterings_have_a_line_for_each_system_with_its_exponent():
    time, memory = clustering_time(clustering_table()).axes
    assert [line.get_label() for line in time.lines] == ["ours: n^1.20", "theirs: n^1.20", "new"]
    assert list(time.lines[0].get_ydata()) == [1, 2.5]
    assert list(memory.lines[2].get_ydata()) == [2]
    assert [label.get_text() for label in time.get_xticklabels()] == ["1k", "2.5k"]
    assert (time.get_yscale(), memory.get_ylim()[0]) == ("log", 0)


def test_stages_are_stacked_to_the_whole_and_the_rest_is_grey():
    figure = extraction_time(extraction_table())
    best, paper = figure.axes
    bars = {bar.get_label(): [(b.get_y(), b.get_height()) for b in bar] for bar in best.containers}
    assert bars["recording"] == [(0, 3), (0, 2.5)]
    assert bars["refit"] == [(3, 0), (2.5, 0.5)]
    assert bars["other"] == [(3, 1), (3, 0)]
    assert [text.get_text() for text in best.texts] == ["4.0", "3.0"]
    assert [text.get_text() for text in paper.texts] == ["9.0"]
    assert best.get_ylabel() == "time (plain forward passes)"
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["recipe best", "recipe paper"]
    assert legend_of(figure) == ["recording", "refit", "other"]
    (grey,) = {bar[0].get_facecolor()[:3] for bar in paper.containers}
    assert grey == pytest.approx([int(style.GREY[i : i + 2], 16) / 255 for i in (1, 3, 5)])
