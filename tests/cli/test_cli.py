"""Commands on models: extract, evaluate, finetune, compare."""

import errno
import json
import re
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from moee_analysis import cli
from moee_analysis.data import images as image_module
from moee_analysis.data.images import load_images
from moee_analysis.extraction.run import load
from moee_analysis.models import exporting
from moee_analysis.models.macs import count
from moee_analysis.report.runner import jupyter
from tests.helpers.calls import extraction, model_of, refused, run_cli
from tests.helpers.images import image_folder
from tests.helpers.models import SMALL_VIT, lively
from tests.measure.evaluation.test_evaluate import FIELDS, LAYER_FIELDS

EXTRACT = ["extract", "--model", "bundled", "--reduce", "pca", "--preset", "smoke"]


def too_late(*_, **__):
    pytest.fail("the command has begun")


def evaluated(place, *command):
    """The numbers that ``evaluate`` writes."""
    assert run_cli("evaluate", *command, "--json", place / "numbers.json") == 0
    return json.loads((place / "numbers.json").read_text())


def test_extract_then_evaluate_writes_every_promised_number(tmp_path, monkeypatch, capsys):
    for split, size in (("calibration", 40), ("evaluation", 30)):
        monkeypatch.setitem(image_module.scenes.SPLIT_SIZES, split, size)
    assert run_cli(*EXTRACT, "--macs-reduction", "0.2", "--out", tmp_path / "run") == 0
    numbers = evaluated(tmp_path, tmp_path / "run")
    assert set(numbers) >= FIELDS
    assert len(numbers["layers"]) == 12
    assert all(set(layer) >= LAYER_FIELDS for layer in numbers["layers"])
    assert numbers["n_images"] == 30
    assert numbers["macs_reduction"] == pytest.approx(0.2, abs=0.03)
    assert 0 < numbers["params_moe"] < numbers["params_dense"]
    assert numbers["provenance"]["seed"] == 0
    assert numbers["dense_top1"] > 0.7
    assert numbers["moe_top1"] > 2 / 20
    out = capsys.readouterr().out
    assert all(text in out for text in ("top-1", "on 30 images", "MACs", "share of hidden neurons"))
    for kind in ("macs", "params"):
        assert f"{numbers[f'{kind}_moe'] / numbers[f'{kind}_dense'] - 1:+.1%})" in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model", "bundeld"], "bundeld"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--calibration", "missing"], "no folder 'missing'"),
        (["--macs-reduction", "28"], "0.28 means 28 %"),
        (["--macs-reduction", "0.2", "--variance-kept", "0.9"], "both"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "a device such as cpu"),
        (["--model", SMALL_VIT, "--img-size", 100], "3 x 100 x 100"),
        (["--store", "/proc/none"], "--store"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(tmp_path, capsys, options, line):
    if SMALL_VIT in options:
        save_file(lively().state_dict(), tmp_path / "w.safetensors")
        options = [*options, "--weights", tmp_path / "w.safetensors"]
    before = set(tmp_path.iterdir())
    assert line in refused(capsys, *EXTRACT, *options, "--out", tmp_path / "run")
    assert set(tmp_path.iterdir()) == before


def test_evaluate_refuses_places_classes_and_if_strict_what_would_be_skipped(run, tmp_path, capsys):
    for place in (tmp_path / "missing" / "numbers.json", tmp_path):
        refused(capsys, "evaluate", run, "--json", place)
    assert "run.json" in refused(capsys, "evaluate", tmp_path)
    folder = image_folder(tmp_path / "dragons", {"dragon": 2})
    assert "dragon" in refused(capsys, "evaluate", run, "--images", folder)
    folder = image_folder(tmp_path / "photos", {"yak": 2}, first=900)
    (folder / "yak" / "broken.png").write_bytes(b"")
    command = [run, "--images", folder]
    assert "broken.png" in refused(capsys, "evaluate", *command, "--strict")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert evaluated(tmp_path, *command)["skipped_images"] == ["yak/broken.png"]


def test_moved_weights_can_be_named(own, run, tmp_path, capsys):
    command = ["evaluate", run, "--images", own / "evaluation"]
    moved = (own / "tuned.pth").rename(tmp_path / "moved.pth")
    try:
        assert "--weights FILE" in refused(capsys, *command)
        assert run_cli(*command, "--weights", moved) == 0
    finally:
        moved.rename(own / "tuned.pth")


def test_an_interruption_is_a_failure_and_other_things_in_a_folder_are_safe(
    monkeypatch, capsys, tmp_path
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moee_analysis.models.loading.load_model", stop)
    assert run_cli(*EXTRACT, "--out", tmp_path / "run") == 1
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("moee_analysis.models.loading.load_model", too_late)
    (tmp_path / "thesis.tex").write_text("all my work")
    assert "thesis.tex" in refused(capsys, *EXTRACT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_export_writes_a_checked_file_or_says_in_one_line_why_not(
    run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "model.pt2"
    assert run_cli("export", run, "--format", "pt2", "--out", out) == 0
    assert re.search(r"saved to .*\(\d\.\d MB\)\n.* at most \(16 images\)", capsys.readouterr().out)
    model = load(run).model
    (x,) = load_images(limit=3).batches(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(x), model(x))
    monkeypatch.setattr(exporting, "find_spec", lambda _: None)
    line = refused(capsys, "export", run, "--out", tmp_path / "model.onnx")
    assert "moee-analysis[deploy]" in line
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_lab_passes_options_on_and_other_commands_refuse_strange_ones(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(jupyter, "open_lab", lambda options: given.append(options) or 0)
    assert cli.main(["lab", "--no-browser", "--port", "8899"]) == 0
    assert given == [["--no-browser", "--port", "8899"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-browser"])
    assert ended.value.code == 2
    assert "--no-browser" in capsys.readouterr().err


def test_finetune_makes_a_run_that_can_be_evaluated(own, run, tmp_path, capsys):
    command = ["finetune", run, "--images", own / "train", "--out", tmp_path / "tuned"]
    given = {"epochs": 2, "learning_rate": 1e-4, "held_out": 0.4, "batch_size": 4, "seed": 3}
    for name, value in (given | {"augmentation": "none"}).items():
        command += [f"--{name.replace('_', '-')}", value]
    assert run_cli(*command) == 0
    out = capsys.readouterr().out
    assert "held out" in out
    assert f"saved to {tmp_path / 'tuned'}" in out
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [
        "curve.png", "metrics.csv", "model.safetensors", "run.json",
    ]  # fmt: skip
    after = evaluated(tmp_path, tmp_path / "tuned", "--images", own / "evaluation")
    assert after["n_images"] == 15
    assert len((tmp_path / "tuned" / "metrics.csv").read_text().splitlines()) == 1 + 3
    assert after["provenance"]["finetunings"][0]["config"].items() >= given.items()
    assert run_cli(*command) == 0  # it has ended
    assert "another folder" in refused(capsys, *command, "--epochs", 1)
    line = refused(capsys, "evaluate", tmp_path / "tuned", "--images", own / "train")
    assert "18 that are" in line
    assert "trained on" in line
    assert "class folders" in refused(capsys, *command, "--images", own / "missing")


def test_compare_writes_a_row_for_every_system(own, tmp_path, capsys):
    systems = ["static: magnitude", "MoEfication: k-means, centre"]
    images = ["--calibration", own / "calibration", "--images", own / "evaluation"]
    command = ["compare", *model_of(own), *images, "--systems", *systems, "--preset", "smoke"]
    command += ["--no-latency", "--macs-reduction", 0.2, 0.9, "--json", tmp_path / "rows.json"]
    assert run_cli(*command) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["system"], row["macs_asked"], row["seed"]) for row in rows] == [
        (name, asked, 0) for asked in (0.2, 0.9) for name in systems
    ]
    for row in rows[:2]:
        assert set(row) >= FIELDS
        assert set(row["controls"]) == {
            "random_routing", "constant_routing", "oracle_routing", "static_pruning",
        }  # fmt: skip
    out = capsys.readouterr().out
    assert "asked to save 20% of the MACs" in out
    assert all(f"  {name}" in out for name in systems)
    assert f"{systems[0]}: expected" in out  # 90 % is more than the MLPs cost
    assert "systems among" in refused(capsys, "compare", "--systems", "magic")
    same = ["--calibration", own / "train", "--images", own / "train"]
    assert "not used for calibration" in refused(capsys, "compare", *model_of(own), *same)


def test_a_tuned_model_is_named_by_its_folders_and_evaluated(own, run, numbers, tmp_path, capsys):
    told = (own / "told.txt").read_text()
    assert "from behind the prefix 'module.'" in told
    assert "the 3 class folders in the order of the alphabet, ant, yak, zebra" in told
    assert "resampled" not in told
    assert told.count("of the dimensions of the heads' scores") == 6
    assert "asked for 1 token(s)" in next(x for x in told.splitlines() if "blocks.5.attn" in x)
    assert numbers["n_images"] == 15
    other = lively(num_classes=3, in_chans=1, img_size=64)
    assert numbers["macs_dense"] == count(other).total
    assert evaluated(tmp_path, run, "--images", own / "one_class")["n_images"] == 6
    page, given = tmp_path / "atlas.html", ["--classes", own / "classes.txt"]
    assert run_cli("atlas", run, "--images", own / "evaluation", "--out", page) == 0
    assert "zebra" in page.read_text()
    told = refused(capsys, "evaluate", run, "--images", own / "calibration")
    assert "36 that are" in told
    assert "--images DIR" in told
    later = evaluated(tmp_path, run, "--images", own / "evaluation", *given)
    assert run_cli(*extraction(own, "--reduce", "pca", *given, "--out", tmp_path / "named")) == 0
    at_once = evaluated(tmp_path, tmp_path / "named", "--images", own / "evaluation")
    assert at_once["dense_top1"] == later["dense_top1"] != numbers["dense_top1"]


def test_classes_that_do_not_fit_are_refused_before_anything_is_computed(own, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    command = extraction(own, "--classes", tmp_path / "two.txt", "--out", tmp_path / "run")
    assert "each of the model's 3 outputs; found 2" in refused(capsys, *command)
    model = [*model_of(own), "--images", own / "one_class"]
    command = ["compare", *model, "--calibration", own / "calibration"]
    assert "--classes FILE" in refused(capsys, *command)
    assert "--classes FILE" in refused(capsys, "report", *model, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_place_that_cannot_be_written_is_told_at_once(own, run, tmp_path, capsys, monkeypatch):
    place = tmp_path / "read_only"
    place.mkdir()

    def trial(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", trial)
    for name in ("load_model", "find_mlps"):
        monkeypatch.setattr(f"moee_analysis.models.loading.{name}", too_late)
    images = [run, "--images", own / "evaluation"]
    for command in (
        extraction(own, "--out", place / "run"),
        ["evaluate", *images, "--json", place / "n.json"],
        ["compare", "--json", place / "n.json"],
        ["atlas", *images, "--out", place / "atlas.html"],
        ["finetune", *images, "--out", place / "tuned"],
        ["report", "--out", place / "report", "--preset", "smoke"],
    ):
        line = refused(capsys, *command)
        assert f"Permission denied: '{place}'" in line
        assert "choose a place" in line
