"""Commands on models: extract, evaluate, finetune, compare."""

from __future__ import annotations

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
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models import class_names
from moee_analysis.models.loading import load_model
from moee_analysis.models.macs import count
from moee_analysis.report.runner import jupyter
from tests.helpers.images import image_folder, toy_images
from tests.helpers.models import SMALL_VIT, lively
from tests.helpers.runs import quick
from tests.measure.evaluation.test_evaluate import FIELDS, LAYER_FIELDS

EXTRACT = ["extract", "--model", "bundled", "--reduce", "pca", "--preset", "smoke"]


def scenes(folder, split="evaluation", count=40):
    """A folder of bundled scenes, as a user would have photographs."""
    images = load_images(split=split, limit=count)
    for index, name in enumerate(images.folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
        images.picture(index).save(folder / name / f"{index}.png")
    return folder


def run_cli(*command):
    return cli.main([str(part) for part in command])


def too_late(*_, **__):
    pytest.fail("the command has begun")


def refused(capsys, *command):
    """The one line that a bad command gets."""
    try:
        code = run_cli(*command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"moee( [a-z]+: argument \S+)?: expected .*\. What to do: .*\.$", line)
    return line


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What extract and evaluate write for the bundled model."""
    root = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_module.scenes.SPLIT_SIZES, "calibration", 80)
        assert run_cli(*EXTRACT, "--macs-reduction", "0.2", "--out", root / "run") == 0
    command = ["evaluate", root / "run", "--images", scenes(root / "scenes")]
    assert run_cli(*command, "--json", root / "numbers.json") == 0
    return root, json.loads((root / "numbers.json").read_text())


@pytest.fixture
def few_scenes(monkeypatch):
    for split, size in (("calibration", 40), ("evaluation", 30)):
        monkeypatch.setitem(image_module.scenes.SPLIT_SIZES, split, size)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tuned model of three classes, as a training script saved it, and pictures of them."""
    root = tmp_path_factory.mktemp("own")
    model = lively(num_classes=3)
    tensors = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": tensors, "epoch": 3}, root / "tuned.pth")
    (root / "classes.txt").write_text("zebra\nant\nyak\n")
    image_folder(root / "calibration", {"ant": 12, "yak": 12, "zebra": 12})
    image_folder(root / "evaluation", {"ant": 5, "yak": 5, "zebra": 5}, first=500)
    image_folder(root / "one_class", {"zebra": 6}, first=800)
    return root


def extraction(own, *options):
    return [
        "extract", "--model", SMALL_VIT, "--weights", own / "tuned.pth", "--reduce", "pca",
        "--calibration", own / "calibration", "--preset", "smoke", *options,
    ]  # fmt: skip


def test_extract_then_evaluate_writes_every_promised_number(evaluated):
    _, numbers = evaluated
    assert set(numbers) >= FIELDS
    assert len(numbers["layers"]) == 12
    assert all(set(layer) >= LAYER_FIELDS for layer in numbers["layers"])
    assert numbers["n_images"] == 40
    assert numbers["macs_reduction"] == pytest.approx(0.2, abs=0.03)
    assert 0 < numbers["params_moe"] < numbers["params_dense"]
    assert numbers["provenance"]["seed"] == 0
    assert numbers["dense_top1"] > 0.7
    assert numbers["moe_top1"] > 2 / 20


def test_a_run_can_be_evaluated_on_the_bundled_images_too(evaluated, few_scenes, capsys):
    assert run_cli("evaluate", evaluated[0] / "run") == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("top-1", "on 30 images", "MACs"))


def test_layers_and_smaller_heads_are_told(own, tmp_path, capsys):
    assert run_cli(*extraction(own, "--variance-kept", 0.9, "--out", tmp_path / "paper")) == 0
    assert "share of hidden neurons" in capsys.readouterr().out
    command = extraction(own, "--recipe", "best", "--macs-reduction", 0.3)
    assert run_cli(*command, "--attention", "low_rank", "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("of the dimensions of the heads' scores" in line for line in lines) == 6
    assert "asked for 1 token(s)" in next(line for line in lines if "blocks.5.attn" in line)


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


def test_a_folder_of_other_things_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moee_analysis.models.loading.load_model", too_late)
    (tmp_path / "thesis.tex").write_text("all my work")
    assert "thesis.tex" in refused(capsys, *EXTRACT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_evaluate_refuses_places_and_classes_in_one_line(evaluated, tmp_path, capsys):
    root, _ = evaluated
    for place in (root / "missing" / "numbers.json", root):
        refused(capsys, "evaluate", root / "run", "--json", place)
    assert "run.json" in refused(capsys, "evaluate", tmp_path)
    folder = image_folder(tmp_path / "photos", {"dragon": 2})
    assert "dragon" in refused(capsys, "evaluate", root / "run", "--images", folder)


def test_strict_refuses_what_would_be_skipped(evaluated, tmp_path, capsys):
    folder = image_folder(tmp_path / "photos", {"cat": 2})
    (folder / "cat" / "broken.png").write_bytes(b"")
    command = ["evaluate", evaluated[0] / "run", "--images", folder]
    assert "broken.png" in refused(capsys, *command, "--strict")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert run_cli(*command, "--json", tmp_path / "numbers.json") == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["skipped_images"] == ["cat/broken.png"]


def test_moved_weights_can_be_named(tmp_path, capsys):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(lively("bundled").state_dict(), old)
    extract(load_model(weights=old), toy_images(24), quick(layers=(0,))).save(tmp_path / "run")
    old.rename(new)
    folder = image_folder(tmp_path / "photos", {"cat": 2, "pug": 2})
    command = ["evaluate", tmp_path / "run", "--images", folder]
    capsys.readouterr()
    assert "--weights FILE" in refused(capsys, *command)
    assert run_cli(*command, "--weights", new) == 0


def test_an_interruption_is_a_failure_without_a_traceback(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moee_analysis.models.loading.load_model", stop)
    assert run_cli(*EXTRACT, "--out", tmp_path / "run") == 1
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lab_passes_options_on_and_other_commands_refuse_strange_ones(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(jupyter, "open_lab", lambda options: given.append(options) or 0)
    assert cli.main(["lab", "--no-browser", "--port", "8899"]) == 0
    assert given == [["--no-browser", "--port", "8899"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-browser"])
    assert ended.value.code == 2
    assert "--no-browser" in capsys.readouterr().err


def test_finetune_makes_a_run_that_can_be_evaluated(evaluated, tmp_path, capsys, monkeypatch):
    root, before = evaluated
    monkeypatch.setenv("MOEE_HEADLESS", "1")
    seen = scenes(tmp_path / "seen", split="train")
    command = ["finetune", root / "run", "--images", seen, "--out", tmp_path / "tuned"]
    command += ["--epochs", 2, "--learning-rate", 1e-4, "--held-out", 0.4, "--batch-size", 8]
    command += ["--augmentation", "none", "--seed", 3]
    assert run_cli(*command) == 0
    out = capsys.readouterr().out
    assert "held out" in out
    assert f"saved to {tmp_path / 'tuned'}" in out
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [
        "curve.png", "metrics.csv", "model.safetensors", "run.json",
    ]  # fmt: skip
    numbers = tmp_path / "numbers.json"
    run = ["evaluate", tmp_path / "tuned", "--images"]
    assert run_cli(*run, root / "scenes", "--json", numbers) == 0
    after = json.loads(numbers.read_text())
    assert after["kl"] < before["kl"]
    assert after["provenance"]["finetunings"][0]["config"]["seed"] == 3
    assert run_cli(*command) == 0  # it has ended
    assert "another folder" in refused(capsys, *command, "--epochs", 1)
    line = refused(capsys, *run, seen)
    assert "40 that are" in line
    assert "trained on" in line
    assert "class folders" in refused(capsys, *command, "--images", root / "missing")


def test_compare_writes_a_row_for_every_system(few_scenes, tmp_path, capsys):
    systems = ["static: magnitude", "MoEfication: k-means, centre"]
    command = ["compare", "--systems", *systems, "--preset", "smoke", "--no-latency"]
    command += ["--macs-reduction", 0.2, 0.9, "--json", tmp_path / "rows.json"]
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


def test_compare_refuses_what_is_wrong_in_one_line(few_scenes, tmp_path, capsys):
    assert "systems among" in refused(capsys, "compare", "--systems", "magic")
    folder = scenes(tmp_path / "a", count=20)
    command = ["compare", "--calibration", folder, "--images", folder]
    assert "not used for calibration" in refused(capsys, *command)


# Models and classes of one's own


def test_a_tuned_model_is_named_by_its_folders_and_evaluated(own, tmp_path, capsys):
    class_names._tell_once.cache_clear()
    assert run_cli(*extraction(own, "--out", tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "from behind the prefix 'module.'" in out
    assert "the 3 class folders in the order of the alphabet, ant, yak, zebra" in out
    numbers = {}
    given = ["--classes", own / "classes.txt"]
    for images, options in (("evaluation", []), ("one_class", []), ("evaluation", given)):
        command = ["evaluate", tmp_path / "run", "--images", own / images, *options]
        assert run_cli(*command, "--json", tmp_path / "n.json") == 0
        numbers[images, bool(options)] = json.loads((tmp_path / "n.json").read_text())
    assert numbers["evaluation", False]["n_images"] == 15
    assert numbers["one_class", False]["n_images"] == 6
    page = tmp_path / "atlas.html"
    assert run_cli("atlas", tmp_path / "run", "--images", own / "evaluation", "--out", page) == 0
    assert "zebra" in page.read_text()
    told = refused(capsys, "evaluate", tmp_path / "run", "--images", own / "calibration")
    assert "36 that are" in told
    assert "--images DIR" in told
    assert run_cli(*extraction(own, *given, "--out", tmp_path / "named")) == 0
    command = ["evaluate", tmp_path / "named", "--images", own / "evaluation"]
    assert run_cli(*command, "--json", tmp_path / "n.json") == 0
    named = json.loads((tmp_path / "n.json").read_text())["dense_top1"]
    assert named == numbers["evaluation", True]["dense_top1"]
    assert named != numbers["evaluation", False]["dense_top1"]


def test_classes_that_do_not_fit_are_refused_before_anything_is_computed(own, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    command = extraction(own, "--classes", tmp_path / "two.txt", "--out", tmp_path / "run")
    assert "each of the model's 3 outputs; found 2" in refused(capsys, *command)
    model = ["--model", SMALL_VIT, "--weights", own / "tuned.pth", "--images", own / "one_class"]
    command = ["compare", *model, "--calibration", own / "calibration"]
    assert "--classes FILE" in refused(capsys, *command)
    assert "--classes FILE" in refused(capsys, "report", *model, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_model_of_another_size_and_one_channel(tmp_path, own, capsys):
    other = lively(num_classes=3, in_chans=1, img_size=96)
    torch.save(other.state_dict(), tmp_path / "w.pth")
    command = extraction(own, "--out", tmp_path / "run")
    command[command.index(own / "tuned.pth")] = tmp_path / "w.pth"
    assert run_cli(*command, "--img-size", 96, "--in-chans", 1) == 0
    assert "resampled" not in capsys.readouterr().out
    numbers = tmp_path / "n.json"
    command = ["evaluate", tmp_path / "run", "--images", own / "evaluation", "--json", numbers]
    assert run_cli(*command) == 0
    assert json.loads(numbers.read_text())["macs_dense"] == count(other).total


def test_a_place_that_cannot_be_written_is_told_at_once(
    own, evaluated, tmp_path, capsys, monkeypatch
):
    place = tmp_path / "read_only"
    place.mkdir()

    def trial(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", trial)
    for name in ("load_model", "find_mlps"):
        monkeypatch.setattr(f"moee_analysis.models.loading.{name}", too_late)
    run = [evaluated[0] / "run", "--images", own / "evaluation"]
    for command in (
        extraction(own, "--out", place / "run"),
        ["evaluate", *run, "--json", place / "n.json"],
        ["compare", "--json", place / "n.json"],
        ["atlas", *run, "--out", place / "atlas.html"],
        ["finetune", *run, "--out", place / "tuned"],
        ["report", "--out", place / "report", "--preset", "smoke"],
    ):
        line = refused(capsys, *command)
        assert f"Permission denied: '{place}'" in line
        assert "choose a place" in line
