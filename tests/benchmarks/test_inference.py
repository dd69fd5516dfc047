import json
import math
from dataclasses import replace

import engines
import inference
import inference_tables
import pytest
import torch
from safetensors.torch import save_file
from timed_systems import IN_TIME, SYSTEMS

from moee_analysis import measure
from moee_analysis.baselines.static_pruning import prune
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import PRESETS
from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe import autotune
from moee_analysis.moe.layer import all_mlps, moe_layers
from tests.helpers.images import contents, image_folder, toy_images
from tests.helpers.models import SMALL_VIT, hooks_of, lively, pixels_of, toy_vit
from tests.helpers.runs import best

IMAGES = toy_images(60)
CALIBRATION, UNSEEN = IMAGES.take(range(24)), IMAGES.take(range(24, 60))
FILES = {"inference.json", "inference.md", "inference.png", "inference_kl.png"}
NAMES = ["dense", "static pruning", "best"]
PLAN = inference.Plan(batches=(1, 3), threads=(1, 2), seconds=1e-5, rounds=3)


@pytest.fixture(scope="module")
def dense():
    return toy_vit()


@pytest.fixture(scope="module")
def runs(dense):
    settings = {"macs_reduction": 0.2, "preset": "smoke"}
    return {
        "static pruning": prune(dense, CALIBRATION, "fisher OBS", **settings),
        "best": extract(dense, CALIBRATION, best(**settings)),
    }


@pytest.fixture(scope="module")
def systems(dense, runs):
    return inference.systems_of(dense, runs, UNSEEN)


def test_systems_and_their_layers_are_timed_at_every_batch_and_number_of_threads(systems, capsys):
    rows, layers = inference.run(systems, UNSEEN, PLAN)
    places = [(row["threads"], row["batch"], row["system"]) for row in rows]
    assert places == [(t, b, name) for t in (1, 2) for b in (1, 3) for name in NAMES]
    for row in rows:
        assert len(row["rounds_ms"]) == 3
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"] < math.inf
        assert min(row["ms"], row["dense_ms"], row["first_call"]) > 0
        assert (row["reached"] is None) == (row["promised"] == 1)
    table = inference_tables.table_of(rows)
    assert list(table.columns) == list(inference_tables.COLUMNS)
    ways = table.set_index("system")["ways"]
    assert set(ways["dense"]) == {""}
    assert set(ways["best"]) == {"3 masked"}
    assert "2 threads, batch 3" in capsys.readouterr().out
    routed = {name: list(moe_layers(system.model)) for name, system in systems.items()}
    places = [(row["threads"], row["system"], row["layer"]) for row in layers]
    assert places == [(t, name, i) for t in (1, 2) for name in NAMES for i in routed[name]]
    for row in layers:
        assert (row["batch"], row["tokens"], row["way"]) == (3, 3 * 17, "masked")
        assert min(row["dense_ms"], row["router_ms"], row["layer_ms"]) > 0


def test_a_row_says_which_strategy_was_chosen_and_why(systems, monkeypatch):
    monkeypatch.setattr(autotune, "LITTLE", 0)
    monkeypatch.setattr(autotune, "ENOUGH", 1e-9)
    with torch.inference_mode():
        rows = inference.measure(systems, [pixels_of(systems["dense"].model)], PLAN)
    (row,) = [row for row in rows if row["system"] == "best"]
    assert [choice["layer"] for choice in row["choices"]] == [0, 1, 2]
    for choice in row["choices"]:
        assert choice["reason"].startswith("fastest")
        assert choice["way"] == min(choice["seconds"], key=choice["seconds"].get)
    choices = [{"way": way} for way in ("sorted, 4 groups", "masked", "sorted, 4 groups")]
    assert inference_tables.count_ways(choices) == "2 sorted, 4 groups; 1 masked"


def test_numbers_of_threads_are_powers_of_two_and_the_most_and_an_error_sets_them_back(
    systems, monkeypatch
):
    assert [inference.thread_counts(n) for n in (1, 6, 8)] == [(1,), (1, 2, 4, 6), (1, 2, 4, 8)]
    with pytest.raises(MoeeError, match="3 images for a batch"):
        inference.run(systems, UNSEEN.take([0, 1]), PLAN)

    def stop(*_args, **_options):
        assert torch.get_num_threads() == 1
        raise RuntimeError("stop")

    most = torch.get_num_threads()
    monkeypatch.setattr(inference, "in_turn", stop)
    with pytest.raises(RuntimeError, match="stop"):
        inference.run(systems, UNSEEN, PLAN)
    assert torch.get_num_threads() == most
    assert not torch.is_inference_mode_enabled()


def test_speed_ups_are_ratios_within_a_round():
    row = inference.speed([1.0, 2.0, 4.0], [2.0, 5.0, 6.0], promised=1.5)
    assert (row["ms"], row["dense_ms"], row["speedup"]) == (2, 5, 2)
    assert (row["speedup_low"], row["speedup_high"]) == (1.75, 2.25)
    assert row["reached"] == 2
    assert inference.speed([1.0], [1.0], promised=1.0)["reached"] is None


def test_macs_promise_what_the_measure_counts(systems, runs):
    assert systems["dense"].promised == 1
    for name, run in runs.items():
        total = measure.macs(run, UNSEEN).iloc[-1]
        assert systems[name].promised == pytest.approx(total["macs_dense"] / total["macs"])
        assert systems[name].promised > 1
        assert hooks_of(run.model) == 0


def test_static_pruning_is_timed_without_routing_and_computes_the_same(systems, dense, runs):
    x, pruned = pixels_of(dense), systems["static pruning"].model
    with torch.inference_mode():
        torch.testing.assert_close(pruned(x), runs["static pruning"].model(x))
    assert len(moe_layers(runs["static pruning"].model)) == 3
    assert list(moe_layers(pruned)) == [2]  # whose patches nothing reads: two experts
    assert len(all_mlps(pruned)) == 3


def test_a_lower_precision_is_that_of_the_products(systems):
    precisions = set()
    first = next(iter(all_mlps(systems["dense"].model).values())).fc1
    with first.register_forward_hook(lambda *seen: precisions.add(seen[-1].dtype)):
        inference.run(systems, UNSEEN, replace(PLAN, threads=(1,), precision="bf16"))
    assert precisions == {torch.bfloat16}


def test_the_command_times_systems_that_it_extracts(tmp_path, capsys, monkeypatch):
    out, few = tmp_path / "out", replace(PRESETS["smoke"], calibration_images=20)
    monkeypatch.setitem(PRESETS, "smoke", few)
    monkeypatch.setattr(inference, "load_model", lambda *_args, **_options: toy_vit())
    inference.main(
        ["--preset", "smoke", "--limit", "4", "--engines", "torch", "--batches", "1,2",
         "--threads", "1", "--seconds", "1e-5", "--rounds", "2", "--store", str(tmp_path / "store"),
         "--out", str(out)]
    )  # fmt: skip
    assert contents(out).keys() == FILES
    text = (out / "inference.json").read_text()
    content = json.loads(text)
    names = [name for name in SYSTEMS if name not in IN_TIME]  # these are to be asked for
    assert [row["system"] for row in content["rows"][: 1 + len(names)]] == ["dense", *names]
    assert content["rows"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert min(row["kl"] for row in content["rows"][1 : 1 + len(names)]) > 0
    assert {row["layer"] for row in content["layers"] if row["system"] == "best"} == {*range(3)}
    assert content["facts"]["model"]["name"] == "toy"
    assert content["facts"]["systems"]["best"]["macs_reduction"] == 0.28
    assert str(tmp_path) not in text
    assert "| 1 | 2 | torch | best | " in (out / "inference.md").read_text()
    assert "making: static pruning" in capsys.readouterr().out


def test_several_budgets_and_engines_have_rows_of_their_own(tmp_path, monkeypatch, capsys):
    out, wanted = tmp_path / "out", ["ONNX Runtime", "ONNX Runtime int8", "OpenVINO"]
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is optional: pip install '.[deploy]'")
    monkeypatch.setattr(inference, "load_model", lambda *_args, **_options: toy_vit())
    inference.main(
        ["--preset", "smoke", "--limit", "20", "--systems", "ToMe", "--macs-reduction",
         "0.2", "0.3", "--batches", "2", "--threads", "1", "--seconds", "1e-5", "--rounds", "2",
         "--out", str(out), "--engines", *wanted]
    )  # fmt: skip
    content = json.loads((out / "inference.json").read_text())
    rows, names = content["rows"], ["dense", *(f"ToMe at −{n} %" for n in (20, 30))]
    places = [(row["engine"], row["system"]) for row in rows]
    assert places == [(engine, name) for engine in ("torch", *wanted) for name in names]
    kl = {(row["engine"], row["system"]): row["kl"] for row in rows}
    assert kl["ONNX Runtime", names[1]] == kl["torch", names[1]]
    assert 0 < kl["ONNX Runtime int8", "dense"] < 0.1
    for row in rows:
        (dense,) = [r for r in rows if (r["engine"], r["system"]) == (row["engine"], "dense")]
        assert row["dense_ms"] == dense["ms"]
    assert "left out" not in capsys.readouterr().out


def test_engines_that_are_not_here_or_are_of_other_precisions_are_left_out(monkeypatch):
    every = list(engines.ENGINES)
    monkeypatch.setattr(engines, "_compiles", lambda: False)
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "openvino" else name)
    here = ("torch", "ONNX Runtime", "ONNX Runtime int8")
    assert engines.usable(every, plain=True) == here
    assert engines.usable(every, plain=False) == ("torch",)
    monkeypatch.setattr(engines, "_compiles", lambda: True)
    assert engines.usable(every, plain=False) == ("torch", "torch.compile")


def test_saved_runs_of_the_model_are_timed_under_the_names_of_their_folders(
    saved_run, tmp_path, capsys
):
    out, images = tmp_path / "out", image_folder(tmp_path / "images", {"one": 2, "two": 1})
    for seed in (0, 1):
        save_file(lively(seed=seed).state_dict(), tmp_path / f"{seed}.safetensors")
    asked = [f"--model={SMALL_VIT}", f"--images={images}", f"--out={out}", "--batches=2",
             "--threads=1", "--seconds=1e-5", "--rounds=1", f"--run={saved_run}", "--engines",
             "torch"]  # fmt: skip
    right, wrong = (f"--weights={tmp_path / str(seed)}.safetensors" for seed in (0, 1))
    for more, words in (
        ([right, f"--run={saved_run}"], "different names"), ([wrong], "'run' of other weights"),
        ([right, "--batches=0,1"], "--batches"), ([right, "--batches=one"], "--batches"),
        ([right, "--batches=1,"], "--batches"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            inference.main([*asked, *more])
        assert words in capsys.readouterr().err
    assert not out.exists()
    inference.main([*asked, right])
    content = json.loads((out / "inference.json").read_text())
    assert [row["system"] for row in content["rows"]] == ["dense", "run"]
    assert content["facts"]["images"]["count"] == 3
