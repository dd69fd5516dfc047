from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from moee_analysis import measure
from moee_analysis.baselines.static_pruning import prune
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.presets import PRESETS
from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe.blocked_mlp import BlockedMlp
from moee_analysis.moe.kernels import autotune as tuning
from moee_analysis.moe.layer import all_mlps, moe_layers
from tests.helpers.images import image_folder, toy_images
from tests.helpers.models import SMALL_VIT, hooks_of, lively, pixels_of, toy_swin, toy_vit
from tests.helpers.processes import benchmark
from tests.helpers.runs import best

IMAGES = toy_images(60)
CALIBRATION, UNSEEN = IMAGES.take(range(24)), IMAGES.take(range(24, 60))
FILES = {"inference.json", "inference.md", "inference.png"}
NAMES = ["dense", "dense, MLPs computed like ours", "static pruning", "best"]


@pytest.fixture(scope="module")
def inference():
    with benchmark("inference") as script:
        yield script


@pytest.fixture(scope="module")
def tables(inference):
    return importlib.import_module("inference_tables")


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
def systems(inference, dense, runs):
    return inference.systems_of(dense, runs, UNSEEN)


@pytest.fixture
def plan(inference):
    return inference.Plan(batches=(1, 3), threads=(1, 2), seconds=1e-5, rounds=3)


@pytest.fixture
def worth_measuring(monkeypatch):
    """Layers of any size find out which way of computing them is the fastest."""
    monkeypatch.setattr(tuning, "LITTLE", 0)
    monkeypatch.setattr(tuning, "ENOUGH", 1e-9)


def answer(model, x):
    with torch.inference_mode():
        return model(x)


def test_every_system_is_timed_at_every_batch_and_number_of_threads(
    inference, systems, plan, tables, capsys
):
    rows, _ = inference.run(systems, UNSEEN, plan)
    places = [(row["threads"], row["batch"], row["system"]) for row in rows]
    assert places == [(t, b, name) for t in (1, 2) for b in (1, 3) for name in NAMES]
    for row in rows:
        assert len(row["rounds_ms"]) == 3
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"] < math.inf
        assert min(row["ms"], row["dense_ms"], row["first_call"]) > 0
        assert (row["reached"] is None) == (row["promised"] == 1)
    table = tables.table_of(rows)
    assert list(table.columns) == list(tables.COLUMNS)
    ways = table.set_index("system")["ways"]
    assert set(ways["dense"]) == {""}
    assert set(ways["best"]) == {"3 masked"}
    assert "2 threads, batch 3" in capsys.readouterr().out


def test_layers_are_timed_beside_their_routers_and_the_dense_mlps(inference, systems, plan):
    _, layers = inference.run(systems, UNSEEN, plan)
    routed = {name: list(moe_layers(system.model)) for name, system in systems.items()}
    places = [(row["threads"], row["system"], row["layer"]) for row in layers]
    assert places == [(t, name, i) for t in (1, 2) for name in NAMES for i in routed[name]]
    for row in layers:
        assert (row["batch"], row["tokens"], row["way"]) == (3, 3 * 17, "masked")
        assert min(row["dense_ms"], row["router_ms"], row["layer_ms"]) > 0


def test_a_row_says_which_way_was_chosen_and_why(inference, systems, plan, worth_measuring):
    with torch.inference_mode():
        rows = inference.measured(systems, [pixels_of(systems["dense"].model)], plan)
    (row,) = [row for row in rows if row["system"] == "best"]
    assert [choice["layer"] for choice in row["choices"]] == [0, 1, 2]
    for choice in row["choices"]:
        assert choice["reason"].startswith("fastest")
        assert choice["way"] == min(choice["seconds"], key=choice["seconds"].get)


def test_ways_are_counted(tables):
    choices = [{"way": way} for way in ("sorted, 4 groups", "masked", "sorted, 4 groups")]
    assert tables.ways(choices) == "2 sorted, 4 groups; 1 masked"


def test_speed_ups_are_ratios_within_a_round(tables):
    row = tables.speed([1.0, 2.0, 4.0], [2.0, 5.0, 6.0], [3.0, 3.0, 4.0], promised=1.5)
    assert (row["ms"], row["dense_ms"], row["speedup"], row["alike"]) == (2, 5, 2, 1.5)
    assert (row["speedup_low"], row["speedup_high"]) == (1.75, 2.25)
    assert row["reached"] == 2
    assert tables.speed([1.0], [1.0], [1.0], promised=1.0)["reached"] is None


def test_macs_promise_what_the_measure_counts(inference, systems, dense, runs):
    assert [systems[name].promised for name in NAMES[:2]] == [1, 1]
    for name, run in runs.items():
        total = measure.macs(run, UNSEEN).iloc[-1]
        assert systems[name].promised == pytest.approx(total["macs_dense"] / total["macs"])
        assert systems[name].promised > 1
        assert hooks_of(run.model) == 0


def test_static_pruning_is_timed_without_routing_and_computes_the_same(systems, dense, runs):
    x, pruned = pixels_of(dense), systems["static pruning"].model
    torch.testing.assert_close(answer(pruned, x), answer(runs["static pruning"].model, x))
    assert len(moe_layers(runs["static pruning"].model)) == 3
    assert list(moe_layers(pruned)) == [2]  # whose patches nothing reads: two experts
    assert len(all_mlps(pruned)) == 3


@pytest.mark.parametrize("network", [toy_vit, toy_swin])
def test_the_dense_model_computed_alike_is_another_one_of_the_same_answers(inference, network):
    model = network()
    before, x = all_mlps(model), pixels_of(model)
    alike = inference.systems_of(model, {}, UNSEEN)["dense, MLPs computed like ours"].model
    torch.testing.assert_close(answer(alike, x), answer(model, x))
    assert {type(mlp) for mlp in all_mlps(alike).values()} == {BlockedMlp}
    assert all_mlps(model) == before


def test_an_error_leaves_the_number_of_threads_as_it_was(inference, systems, plan, monkeypatch):
    def stop(*_args, **_options):
        assert torch.get_num_threads() == 1
        raise RuntimeError("stop")

    most = torch.get_num_threads()
    monkeypatch.setattr(inference, "in_turn", stop)
    with pytest.raises(RuntimeError, match="stop"):
        inference.run(systems, UNSEEN, plan)
    assert torch.get_num_threads() == most
    assert not torch.is_inference_mode_enabled()


def test_a_lower_precision_is_that_of_the_products(inference, systems, plan, monkeypatch):
    precisions = set()
    first = next(iter(all_mlps(systems["dense"].model).values())).fc1
    with first.register_forward_hook(lambda *seen: precisions.add(seen[-1].dtype)):
        inference.run(systems, UNSEEN, replace(plan, threads=(1,), precision="bf16"))
    assert precisions == {torch.bfloat16}


def test_thread_counts_are_powers_of_two_and_the_most(inference):
    assert inference.thread_counts(1) == (1,)
    assert inference.thread_counts(6) == (1, 2, 4, 6)
    assert inference.thread_counts(8) == (1, 2, 4, 8)


def test_a_batch_needs_as_many_images(inference, systems, plan):
    with pytest.raises(MoeeError, match="3 images for a batch"):
        inference.run(systems, UNSEEN.take([0, 1]), plan)


def test_the_command_times_the_bundled_model(inference, tmp_path, capsys, monkeypatch):
    out, few = tmp_path / "out", replace(PRESETS["smoke"], calibration_images=20)
    monkeypatch.setitem(PRESETS, "smoke", few)
    inference.main(
        ["--preset", "smoke", "--limit", "4", "--attention", "--batches", "1,2", "--threads", "1",
         "--seconds", "1e-5", "--rounds", "2", "--store", str(tmp_path / "store"),
         "--out", str(out)]
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == FILES
    text = (out / "inference.json").read_text()
    content = json.loads(text)
    assert [row["system"] for row in content["rows"][:4]] == NAMES
    assert {row["layer"] for row in content["layers"] if row["system"] == "best"} == {*range(12)}
    assert content["facts"]["model"]["name"] == "bundled"
    assert content["facts"]["systems"]["best"]["macs_reduction"] == 0.28
    assert str(tmp_path) not in text
    assert "| 1 | 2 | best | " in (out / "inference.md").read_text()
    assert "making: static pruning" in capsys.readouterr().out


@pytest.fixture
def command(inference, tmp_path):
    """Time saved runs of the small ViT, with weights of this seed."""

    def command(*folders, seed=0):
        weights = tmp_path / "dense.safetensors"
        save_file(lively(seed=seed).state_dict(), weights)
        images = image_folder(tmp_path / f"images of {seed}", {"one": 2, "two": 1})
        given = {"model": SMALL_VIT, "weights": weights, "images": images, "out": tmp_path / "out"}
        fixed = ["--batches=2", "--threads=1", "--seconds=1e-5", "--rounds=1"]
        chosen = [f"--run={folder}" for folder in folders]
        inference.main([*(f"--{name}={value}" for name, value in given.items()), *fixed, *chosen])

    return command


def test_saved_runs_are_timed_under_the_names_of_their_folders(command, saved_run, tmp_path):
    command(saved_run)
    content = json.loads((tmp_path / "out" / "inference.json").read_text())
    assert [row["system"] for row in content["rows"]] == [*NAMES[:2], "run"]
    assert content["facts"]["images"]["count"] == 3


def test_runs_of_one_name_or_of_another_model_are_refused(command, saved_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(saved_run, saved_run)
    assert "different names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(saved_run, seed=1)
    assert "'run' of other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_refused(inference, capsys):
    for text in ("0,1", "one", "1,"):
        with pytest.raises(SystemExit):
            inference.main(["--batches", text])
        assert "--batches" in capsys.readouterr().err
