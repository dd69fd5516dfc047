from __future__ import annotations

import importlib
import json

import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe.expert_layer import counting_usage
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit
from tests.helpers.processes import benchmark
from tests.helpers.runs import best

IMAGES = toy_images(60)
CALIBRATION, UNSEEN = IMAGES.take(range(24)), IMAGES.take(range(24, 60))
FILES = {"fidelity.json", "fidelity.csv", "fidelity.md", "fidelity.png"}
TWO = ("magnitude", "best, random routing")


@pytest.fixture(scope="module")
def fidelity():
    with benchmark("fidelity") as script:
        yield script


@pytest.fixture(scope="module")
def tables(fidelity):
    return importlib.import_module("fidelity_tables")


@pytest.fixture
def bench(fidelity, tmp_path):
    store = tmp_path / "store"
    return fidelity.Bench(toy_vit(), CALIBRATION, UNSEEN, preset="smoke", store=store)


@pytest.fixture
def measured(fidelity, bench, tmp_path):
    """Measure some systems at some points into one folder."""

    def run(*systems, points=("0.2",), seeds=(0,)):
        points = [fidelity.Point.parsed(text) for text in points]
        return fidelity.run(bench, systems=systems, points=points, seeds=seeds, out=tmp_path)

    return run


def files_in(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_two_systems_at_one_point_are_a_complete_table_and_four_files(
    measured, tables, tmp_path, capsys
):
    table = measured(*TWO)
    assert files_in(tmp_path) == FILES
    assert list(table.columns) == list(tables.COLUMNS)
    assert list(table["system"]) == list(TWO)
    assert table.drop(columns=["params_asked", "reason"]).notna().all(axis=None)
    assert table["reason"].isna().all()
    assert table["macs_reduction"][0] == pytest.approx(0.2, abs=0.003)
    assert (table["n_images"] == len(UNSEEN)).all()
    numbers = table.drop(columns="reason")
    written = pd.read_csv(tmp_path / "fidelity.csv")[list(numbers.columns)]
    pd.testing.assert_frame_equal(written, numbers, check_dtype=False)
    printed = capsys.readouterr().out
    assert "[1/1] −20 %, seed 0" in printed
    assert all(f"making: {name}" in printed for name in TWO)


def test_the_facts_say_what_was_measured_and_name_no_path(measured, bench, tmp_path):
    measured("magnitude")
    text = (tmp_path / "fidelity.json").read_text()
    facts = json.loads(text)["facts"]
    assert {"date", "machine", "versions", "model", "images", "calibration", "preset"} == set(facts)
    assert (facts["images"]["count"], facts["calibration"]["count"]) == (36, 24)
    assert "cores" in facts["machine"]
    assert str(tmp_path) not in text


def test_a_second_run_computes_nothing_again(measured, fidelity, monkeypatch, tmp_path):
    table = measured(*TWO)
    before = (tmp_path / "fidelity.json").read_bytes()
    monkeypatch.setattr(fidelity, "measured", lambda *_: pytest.fail("again"))
    pd.testing.assert_frame_equal(measured(*TWO), table)
    assert (tmp_path / "fidelity.json").read_bytes() == before


def test_only_what_is_missing_is_measured_and_the_rest_is_kept(measured, fidelity, monkeypatch):
    first = measured("magnitude")
    made = []
    prune = fidelity.prune
    monkeypatch.setattr(
        fidelity, "prune", lambda *args, **kwargs: made.append(args[2]) or prune(*args, **kwargs)
    )
    both = measured("magnitude", "variance + mean shift")
    assert made == ["variance + mean shift"]
    pd.testing.assert_frame_equal(both[:1], first)
    other = measured("magnitude", points=("0.1",), seeds=(0, 1))
    assert len(other) == 4
    assert other["macs_asked"].tolist() == [0.1, 0.1, 0.2, 0.2]


def test_a_row_of_another_configuration_is_measured_again(measured, fidelity, monkeypatch):
    first = measured("best, one expert")
    other = fidelity.SYSTEMS["variance + mean shift"]
    monkeypatch.setitem(fidelity.SYSTEMS, "best, one expert", other)
    again = measured("best, one expert")
    assert len(again) == 1
    assert again["kl"][0] != first["kl"][0]


def test_what_cannot_be_reached_is_a_row_with_the_reason(measured, tmp_path):
    table = measured("magnitude", "paper", points=("0.2/0.1", "0.99"))
    assert table["top1"].notna().tolist() == [False, True, False, False]
    assert table["reason"].notna().tolist() == [True, False, True, True]
    assert "99.0%" in table["reason"][0]
    assert "params_reduction" in table["reason"][3]
    words = (tmp_path / "fidelity.md").read_text()
    assert "| magnitude | – | " in words
    assert "- paper, −20 % / −10 %: " in words


def test_other_images_need_another_folder(measured, fidelity, bench, tmp_path):
    measured("magnitude")
    before = (tmp_path / "fidelity.json").read_bytes()
    fewer = fidelity.Bench(bench.model, CALIBRATION, UNSEEN.take(range(6)), "smoke", bench.store)
    with pytest.raises(MoeeError, match="same images"):
        fidelity.run(fewer, systems=["magnitude"], points=[], seeds=[0], out=tmp_path)
    assert (tmp_path / "fidelity.json").read_bytes() == before


def test_calibration_images_are_not_measured_on(fidelity, bench, tmp_path):
    same = fidelity.Bench(bench.model, CALIBRATION, IMAGES, "smoke", bench.store)
    with pytest.raises(MoeeError, match="24 that are"):
        fidelity.run(same, systems=["magnitude"], points=[], seeds=[0], out=tmp_path)
    assert not files_in(tmp_path)


def test_savings_are_those_of_the_measure_with_the_routes_of_the_same_pass(fidelity):
    dense = toy_vit()
    run = extract(dense, CALIBRATION, best(macs_reduction=0.2))
    models = {"best": run.model, "random": randomly_routed(run)}
    with counting_usage(models) as usage:
        for x in UNSEEN.batches(dense):
            for model in models.values():
                model(x)
    for name, model in models.items():
        found = fidelity.savings(model, dense, usage[name])
        total = measure.macs(model, UNSEEN).iloc[-1]
        assert found["macs_reduction"] == pytest.approx(1 - total["macs"] / total["macs_dense"])
        saved = 1 - total["params"] / total["params_dense"]
        assert found["params_reduction"] == pytest.approx(saved)
        assert hooks_of(model) == 0
        assert sum(int(n.sum()) for n in usage[name].values()) == 3 * 17 * len(UNSEEN)


def test_seeds_become_means_within_the_widest_interval(tables):
    row = dict.fromkeys(tables.COLUMNS) | {"system": "best", "family": "f", "macs_asked": 0.2}
    one = {"seed": 0, "retention": 0.8, "retention_low": 0.7, "retention_high": 0.9, "kl": 0.1}
    two = {"seed": 1, "retention": 0.9, "retention_low": 0.8, "retention_high": 1.0, "kl": 0.3}
    table = tables.table_of([row | two, row | one], ["best"])
    assert table["seed"].tolist() == [0, 1]
    (mean,) = tables.over_seeds(table).to_dict("records")
    assert [mean[n] for n in ("retention", "retention_low", "retention_high", "kl")] == (
        pytest.approx([0.85, 0.7, 1.0, 0.2])
    )


def test_the_figure_leaves_out_what_could_not_be_told_apart(fidelity, tables):
    everything = pd.DataFrame({"system": list(fidelity.SYSTEMS)})
    shown = set(tables.for_figure(everything)["system"])
    assert len(shown) == 10
    assert {"magnitude", "fisher OBS", "paper", "best", "best, attention too"} < shown
    few = everything[:6]
    assert tables.for_figure(few).equals(few)


def test_the_command_measures_the_bundled_model(fidelity, tmp_path, capsys):
    fidelity.main(
        ["--preset", "smoke", "--limit", "40", "--points", "0.28", "--systems", "magnitude",
         "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert files_in(tmp_path / "out") == FILES
    assert "| magnitude | " in (tmp_path / "out" / "fidelity.md").read_text()
    assert "magnitude: retention" in capsys.readouterr().out


def test_bad_input_is_told_in_one_line(fidelity, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(["--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "class folders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_system_has_a_configuration_for_a_free_budget(fidelity):
    point = fidelity.Point.parsed("0.28")
    for system in fidelity.SYSTEMS.values():
        config = system.config(macs_reduction=point.macs, params_reduction=None, seed=1)
        assert (config.macs_reduction, config.seed) == (0.28, 1)
    assert fidelity.Point.parsed("0.29/0.20") == fidelity.Point(0.29, 0.2)
