import json
from dataclasses import replace
from functools import partial

import fidelity
import fidelity_tables
import pandas as pd
import pytest

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import PRESETS, ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe.layer import counting_usage
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit
from tests.helpers.runs import CLUSTERING, best

IMAGES = toy_images(60)
CALIBRATION, UNSEEN = IMAGES.take(range(24)), IMAGES.take(range(24, 60))
FILES = {"fidelity.json", "fidelity.csv", "fidelity.md", "fidelity.png"}
TWO = ("magnitude", "best, random routing")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    store = tmp_path_factory.mktemp("fidelity") / "store"
    return fidelity.Bench(toy_vit(), CALIBRATION, UNSEEN, preset="smoke", store=store)


@pytest.fixture
def measure_in(bench, tmp_path):
    """Measure some systems at some points into one folder."""

    def run(*systems, points=("0.2",), seeds=(0,), of=bench):
        points = [fidelity.Point.parse(text) for text in points]
        return fidelity.run(of, systems=systems, points=points, seeds=seeds, out=tmp_path)

    return run


def files_in(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_two_systems_at_one_point_are_a_table_and_four_files_once(
    measure_in, tmp_path, capsys, monkeypatch
):
    table = measure_in(*TWO)
    assert files_in(tmp_path) == FILES
    assert list(table.columns) == list(fidelity_tables.COLUMNS)
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
    text = (tmp_path / "fidelity.json").read_text()
    facts = json.loads(text)["facts"]
    assert {"date", "machine", "versions", "model", "images", "calibration", "preset"} <= set(facts)
    assert (facts["images"]["count"], facts["calibration"]["count"]) == (36, 24)
    assert "cores" in facts["machine"]
    assert str(tmp_path) not in text
    monkeypatch.setattr(fidelity, "measure_at", lambda *_: pytest.fail("again"))
    pd.testing.assert_frame_equal(measure_in(*TWO), table)
    assert (tmp_path / "fidelity.json").read_text() == text


def test_only_missing_rows_are_measured_and_a_system_made_otherwise_is_again(
    measure_in, monkeypatch
):
    name, extracted = "best, one expert", []
    make = fidelity.Bench.extracted
    monkeypatch.setattr(
        fidelity.Bench, "extracted", lambda *args: extracted.append(args[1]) or make(*args)
    )
    first = measure_in(name)
    both = measure_in("magnitude", name, points=("0.3", "0.2"))
    assert extracted.count(name) == 2
    assert both["macs_asked"].tolist() == [0.2, 0.3] * 2
    ours = both[(both["system"] == name) & (both["macs_asked"] == 0.2)]
    pd.testing.assert_frame_equal(ours[:1].reset_index(drop=True), first)
    monkeypatch.setitem(fidelity.SYSTEMS, name, fidelity.SYSTEMS["variance + mean shift"])
    again = measure_in(name)
    assert len(again) == len(both)
    assert again["kl"][ours.index[0]] != first["kl"][0]


def test_tokens_merge_in_many_ways_within_a_budget(measure_in):
    names = [name for name, each in fidelity.SYSTEMS.items() if each.family in (
        fidelity.MERGING, fidelity.ALL)]  # fmt: skip
    table = measure_in(*names, points=("0.25",))
    assert table["reason"].isna().all()
    assert table["macs_reduction"].between(0.245, 0.285).all()  # a toy's heads go in large steps


def test_rows_of_another_code_are_measured_again(measure_in, bench, monkeypatch):
    before = bench.key("magnitude", fidelity.Point(0.2), 0)
    monkeypatch.setattr(fidelity, "CODE", "another")
    assert bench.key("magnitude", fidelity.Point(0.2), 0) != before


def test_points_that_cannot_be_reached_are_rows_with_the_reason(measure_in, tmp_path, monkeypatch):
    quick = partial(ExtractConfig, recipe="paper", clustering=CLUSTERING)
    monkeypatch.setitem(fidelity.SYSTEMS, "paper", fidelity.System(fidelity.MIXTURE, quick))
    table = measure_in("magnitude", "paper", points=("0.2/0.1", "0.99"))
    assert table["top1"].notna().tolist() == [False, True, False, False]
    assert table["reason"].notna().tolist() == [True, False, True, True]
    assert "99.0%" in table["reason"][0]
    assert "params_reduction" in table["reason"][3]
    words = (tmp_path / "fidelity.md").read_text()
    assert "| magnitude | – | " in words
    assert "- paper, −20 % / −10 %: " in words


def test_other_images_need_another_folder_and_calibration_images_none(measure_in, bench, tmp_path):
    same = fidelity.Bench(bench.model, CALIBRATION, IMAGES, "smoke", bench.store)
    with pytest.raises(MoeeError, match="24 that are"):
        measure_in("magnitude", of=same)
    assert not files_in(tmp_path)
    measure_in("magnitude")
    before = (tmp_path / "fidelity.json").read_bytes()
    fewer = fidelity.Bench(bench.model, CALIBRATION, UNSEEN.take(range(6)), "smoke", bench.store)
    with pytest.raises(MoeeError, match="same images"):
        measure_in("magnitude", of=fewer)
    assert (tmp_path / "fidelity.json").read_bytes() == before


def test_savings_are_those_of_the_measure_with_the_routes_of_the_same_pass():
    dense = toy_vit(depth=2)
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
        assert sum(int(n.sum()) for n in usage[name].values()) == 2 * 17 * len(UNSEEN)


def test_seeds_become_means_within_the_widest_interval():
    columns = ["seed", "retention", "retention_low", "retention_high", "kl"]
    rows = pd.DataFrame([(1, 0.9, 0.8, 1, 0.3), (0, 0.8, 0.7, 0.9, 0.1)], columns=columns)
    row = dict.fromkeys(fidelity_tables.COLUMNS) | {"system": "best", "macs_asked": 0.2}
    seeds = [row | {"family": "f"} | each for each in rows.to_dict("records")]
    table = fidelity_tables.table_of(seeds, ["best"])
    assert table["seed"].tolist() == [0, 1]
    (mean,) = fidelity_tables.over_seeds(table).to_dict("records")
    assert [mean[n] for n in columns[1:]] == pytest.approx([0.85, 0.7, 1.0, 0.2])


def test_the_figure_leaves_out_systems_that_could_not_be_told_apart():
    everything = pd.DataFrame({"system": list(fidelity.SYSTEMS)})
    shown = set(fidelity_tables.for_figure(everything)["system"])
    assert len(shown) == 10
    assert {"magnitude", "paper", "best", "ToMe", "best, all three"} < shown
    assert fidelity_tables.for_figure(everything[:6]).equals(everything[:6])


def test_the_command_measures_a_model(tmp_path, capsys, monkeypatch):
    few = replace(PRESETS["smoke"], calibration_images=20)
    monkeypatch.setitem(PRESETS, "smoke", few)
    asked = ["--preset", "smoke", "--limit", "20", "--points", "0.28", "--systems", "magnitude"]
    fidelity.main([*asked, f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'out'}"])
    assert files_in(tmp_path / "out") == FILES
    assert "| magnitude | " in (tmp_path / "out" / "fidelity.md").read_text()
    assert "magnitude: retention" in capsys.readouterr().out


def test_every_system_has_a_configuration_for_a_free_budget():
    point = fidelity.Point.parse("0.28")
    for system in fidelity.SYSTEMS.values():
        asked = {"macs_reduction": point.macs, "params_reduction": None, "preset": "smoke"}
        config = system.config(**asked, seed=1)
        assert config is None or (config.macs_reduction, config.seed) == (0.28, 1)
    assert fidelity.Point.parse("0.29/0.20") == fidelity.Point(0.29, 0.2)
