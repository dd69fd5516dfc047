import copy
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data import images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import run as runs
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.loading import class_names, load_model
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import contents, toy_images
from tests.helpers.models import SMALL_VIT, TINY, lively, same_models, toy_moe
from tests.helpers.runs import quick, run_of, saved_and_loaded

FILES = ["model.safetensors", "run.json"]


# There and back


def test_a_loaded_run_is_the_saved_one_bit_for_bit(small_run, saved_run, tmp_path):
    loaded = saved_and_loaded(small_run, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(saved_run)
    assert sorted(contents(saved_run)) == FILES
    told = json.loads((saved_run / "run.json").read_text())
    assert told["provenance"] == small_run.provenance
    assert (told["config"]["seed"], len(told["layers"])) == (0, 6)
    modes = [path.stat().st_mode & 0o044 for path in (tmp_path / "copy").iterdir()]
    assert modes == [0o044] * 2  # others may read it
    for index, layer in moe_layers(small_run.model).items():
        other = moe_layers(loaded.model)[index]
        for expert in range(layer.n_experts):
            assert torch.equal(other.expert_neurons(expert), layer.expert_neurons(expert))


def test_extracting_again_with_the_same_seed_gives_the_same_files(saved_run, tmp_path):
    extract(lively(), toy_images(), quick()).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved_run)


def test_loading_needs_neither_images_nor_dense_weights(small_run, saved_run, monkeypatch):
    monkeypatch.setattr(images, "load_images", lambda *_, **__: pytest.fail("no images"))
    monkeypatch.setattr(
        "moee_analysis.models.loading.read_tensors", lambda *_: pytest.fail("no weights")
    )
    loaded = load(saved_run)
    assert not loaded.model.training
    assert class_names(loaded.model) == class_names(small_run.model)
    assert tuple(loaded.model.pretrained_cfg["mean"]) == small_run.model.pretrained_cfg["mean"]


@pytest.mark.parametrize("settings", [{"layers": (1,)}, {"experts": "one"}])
def test_layers_that_stay_dense_and_single_experts_are_saved_too(tmp_path, settings):
    run = extract(lively(num_classes=7, **TINY), toy_images(8), quick(**settings))
    saved_and_loaded(run, tmp_path / "run")


# The dense model of a loaded run


def test_the_dense_model_comes_from_the_weights_the_run_was_cut_from(tmp_path):
    save_file(lively(**TINY).state_dict(), tmp_path / "dense.safetensors")
    model = load_model(SMALL_VIT, weights=tmp_path / "dense.safetensors", **TINY)
    extract(model, toy_images(4), quick(experts="one")).save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert same_models(loaded.dense(), model)

    shutil.move(tmp_path / "dense.safetensors", tmp_path / "moved.safetensors")
    with pytest.raises(MoeeError, match=r"--weights FILE"):
        loaded.dense()
    assert same_models(loaded.dense(weights=tmp_path / "moved.safetensors"), model)

    save_file(lively(seed=1, **TINY).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(MoeeError, match="other weights"):
        loaded.dense(weights=tmp_path / "other.safetensors")


# Damaged, edited and foreign files


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_foreign_or_missing_file_is_refused(saved_run, name):
    path = saved_run / name
    whole = path.read_bytes()
    truncated = [whole[:kept] for kept in (0, 1, 50, 2000, -3)]
    for content in [*truncated, b"{}", b"[]", b"null", b"\xff\xfe", b"foreign\n"]:
        path.write_bytes(content)
        with pytest.raises(MoeeError):
            load(saved_run)
    for put in (os.mkfifo, os.mkdir):
        path.unlink()
        put(path)
        with pytest.raises(MoeeError, match=r"a named pipe|a folder"):
            load(saved_run)
    path.rmdir()
    with pytest.raises(MoeeError, match=name):
        load(saved_run)
    with pytest.raises(MoeeError, match="check the path"):
        load(saved_run / "missing")


EDITS = [
    lambda facts: facts["model"]["routers"].update({"norm": {"kind": "constant"}}),
    lambda facts: facts["model"].update(architecture="test_vit2"),
    lambda facts: facts["model"]["pretrained_cfg"].update(mean=[0, 0, 0]),
    lambda facts: facts["layers"][0].update(experts=9),
    lambda facts: facts.pop("provenance"),
    lambda facts: facts.update(note="mine"),
]


def test_an_edited_json_is_refused(saved_run):
    path = saved_run / "run.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=None))
    assert load(saved_run).model  # only laid out anew
    for edit in EDITS:
        edit(facts := json.loads(text))
        path.write_text(json.dumps(facts))
        with pytest.raises(MoeeError, match="a file edited since then"):
            load(saved_run)


def test_tensors_that_are_edited_or_of_another_run_are_refused(saved_run, tmp_path):
    tensors = load_file(saved_run / "model.safetensors")
    tensors["blocks.0.mlp.neurons"][0] += 1
    save_file(tensors, saved_run / "model.safetensors")
    with pytest.raises(MoeeError, match=r"another content in model\.safetensors"):
        load(saved_run)
    run_of(toy_moe(lively())).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved_run)
    with pytest.raises(MoeeError, match="another content"):
        load(saved_run)


def test_a_newer_format_is_refused(saved_run, monkeypatch, small_run):
    monkeypatch.setattr(runs, "FORMAT", runs.FORMAT + 1)
    small_run.save(saved_run)
    monkeypatch.undo()
    with pytest.raises(MoeeError, match=f"format {runs.FORMAT + 1}") as error:
        load(saved_run)
    assert "version" in error.value.hint


def test_a_run_that_the_store_holds_in_another_format_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FORMAT", 1)
    monkeypatch.setattr(runs, "READABLE", (1,))
    dense, images, config = lively(**TINY), toy_images(4), quick(experts="one")
    extract(dense, images, config, store=tmp_path)
    monkeypatch.undo()
    assert extract(dense, images, config, store=tmp_path).model
    assert len(list(tmp_path.glob("run-*"))) == 2


# Where a run may be saved


def test_a_place_is_made_and_an_earlier_run_replaced(small_run, saved_run, tmp_path):
    (tmp_path / "a" / "empty").mkdir(parents=True)
    for folder in (tmp_path / "a" / "empty", tmp_path / "b" / "c" / "run"):
        small_run.save(folder)
        assert sorted(contents(folder)) == FILES
    told = small_run.provenance | {"note": [1, None, "é"]}  # more of the origin
    for run in (run_of(toy_moe(lively())), replace(small_run, provenance=told)):
        run.save(saved_run)
        assert same_models(load(saved_run).model, run.model)
    assert load(saved_run).provenance == told
    assert sorted(contents(saved_run)) == FILES


@pytest.mark.parametrize("with_run", [False, True])
def test_a_folder_of_other_things_is_refused_and_left_alone(small_run, tmp_path, with_run):
    folder = tmp_path / "precious"
    if with_run:
        small_run.save(folder)
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("all my work")
    before = contents(folder)
    with pytest.raises(MoeeError, match=r"thesis\.tex"):
        small_run.save(folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(MoeeError, match="a file"):
        small_run.save(folder / "thesis.tex")
    assert contents(folder) == before


@pytest.mark.parametrize("broken", ["save_file", "write_json"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_save_leaves_no_half_written_run(
    small_run, tmp_path, monkeypatch, broken, earlier
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if earlier:
        small_run.save(tmp_path / "run")
    before = contents(tmp_path / "run") if earlier else None
    monkeypatch.setattr(runs, broken, full)
    with pytest.raises(MoeeError, match="No space left"):
        small_run.save(tmp_path / "run")
    if earlier:
        assert contents(tmp_path / "run") == before
    assert len(list(tmp_path.iterdir())) == int(earlier)


def test_controls_and_weights_that_are_not_finite_are_not_saved(small_run, tmp_path):
    with pytest.raises(MoeeError, match="RandomRouter"):
        replace(small_run, model=randomly_routed(small_run)).save(tmp_path / "control")
    model = copy.deepcopy(small_run.model)
    model.norm.bias[0] = torch.nan
    with pytest.raises(MoeeError, match=r"NaN or infinity in norm\.bias"):
        replace(small_run, model=model).save(tmp_path / "run")
    assert not list(tmp_path.iterdir())
