from __future__ import annotations

import errno
import json
import re
import tempfile

import pytest
import torch

from moee_analysis import cli
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models import class_names as classes
from moee_analysis.models.loading import load_model
from moee_analysis.models.macs import count
from moee_analysis.report.runner import run_notebooks as report
from tests.helpers.images import image_folder
from tests.helpers.models import SMALL_VIT, lively
from tests.measure.evaluation.test_evaluate import FIELDS, LAYER_FIELDS

EXTRACT = ["extract", "--model", "bundled", "--reduce", "pca", "--preset", "smoke"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What extract and evaluate write for the bundled model."""
    root = tmp_path_factory.mktemp("cli")
    assert cli.main([*EXTRACT, "--macs-reduction", "0.2", "--out", str(root / "run")]) == 0
    command = ["evaluate", str(root / "run"), "--images", str(scenes(root / "scenes"))]
    assert cli.main([*command, "--json", str(root / "numbers.json")]) == 0
    return root, json.loads((root / "numbers.json").read_text())


def scenes(folder, split="evaluation"):
    """A folder of 60 of the bundled scenes, as a user would have photographs."""
    from moee_analysis.data.images import load_images

    images = load_images(split=split, limit=60)
    for index, name in enumerate(images.folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
        images.picture(index).save(folder / name / f"{index}.png")
    return folder


def run_cli(*command):
    return cli.main([str(part) for part in command])


def refused(capsys, *command):
    """The one line that a bad command gets."""
    try:
        code = run_cli(*command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.match(r"moee( [a-z]+: argument \S+)?: expected .*\. What to do: .*\.$", lines[0])
    return lines[0]


def test_extract_then_evaluate_writes_every_promised_number(told):
    _, numbers = told
    assert set(numbers) >= FIELDS
    assert len(numbers["layers"]) == 12
    assert all(set(layer) >= LAYER_FIELDS for layer in numbers["layers"])
    assert numbers["n_images"] == 60
    assert numbers["macs_reduction"] == pytest.approx(0.2, abs=0.03)
    assert 0 < numbers["params_moe"] < numbers["params_dense"]
    assert numbers["provenance"]["seed"] == 0


def test_the_numbers_are_those_of_the_bundled_model(told):
    _, numbers = told
    assert numbers["dense_top1"] > 0.7
    assert numbers["moe_top1"] > 2 / 20


def test_a_run_can_be_evaluated_on_the_bundled_images_too(tmp_path, capsys, monkeypatch):
    from moee_analysis.data import images

    monkeypatch.setitem(images.scenes.SPLIT_SIZES, "evaluation", 40)
    monkeypatch.setitem(images.scenes.SPLIT_SIZES, "calibration", 40)
    assert run_cli(*EXTRACT, "--variance-kept", "0.9", "--out", tmp_path / "run") == 0
    assert "share of hidden neurons" in capsys.readouterr().out
    assert run_cli("evaluate", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "on 40 images" in out
    assert "MACs" in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model", "bundeld"], "bundeld"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--calibration", "missing"], "no folder 'missing'"),
        (["--macs-reduction", "28"], "0.28 means 28 %"),
        (["--macs-reduction", "0.2", "--variance-kept", "0.9"], "both"),
        (["--recipe", "worst"], "recipe"),
        (["--reduce", "tsne"], "reduce"),
        (["--noise", "ignore"], "noise"),
        (["--attention", "much"], "attention"),
        (["--seed", "-1"], "seed"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(tmp_path, capsys, options, line):
    assert line in refused(capsys, *EXTRACT, *options, "--out", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moee_analysis.load_model", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "thesis.tex").write_text("all my work")
    assert "thesis.tex" in refused(capsys, *EXTRACT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_json_without_a_folder_is_refused_before_the_work(told, capsys, monkeypatch):
    root, _ = told
    monkeypatch.setattr("moee_analysis.load", lambda *_: pytest.fail("too late"))
    for place in (root / "missing" / "numbers.json", root):
        refused(capsys, "evaluate", root / "run", "--json", place)


def test_unknown_classes_are_told_by_evaluate(told, tmp_path, capsys):
    root, _ = told
    folder = image_folder(tmp_path / "photos", {"dragon": 2})
    assert "dragon" in refused(capsys, "evaluate", root / "run", "--images", folder)


def test_strict_refuses_what_would_be_skipped(told, tmp_path, capsys):
    root, _ = told
    folder = image_folder(tmp_path / "photos", {"cat": 2})
    (folder / "cat" / "broken.png").write_bytes(b"")
    command = ["evaluate", root / "run", "--images", folder]
    assert "broken.png" in refused(capsys, *command, "--strict")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert run_cli(*command, "--json", tmp_path / "numbers.json") == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["skipped_images"] == ["cat/broken.png"]


def test_a_foreign_folder_is_no_run(tmp_path, capsys):
    assert "run.json" in refused(capsys, "evaluate", tmp_path)


def test_moved_weights_can_be_named(tmp_path, capsys):
    from safetensors.torch import save_file

    from tests.helpers.images import toy_images
    from tests.helpers.runs import quick

    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(lively("bundled").state_dict(), old)
    images = toy_images(24)
    extract(load_model(weights=old), images, quick(layers=(0,))).save(tmp_path / "run")
    old.rename(new)
    folder = image_folder(tmp_path / "photos", {"cat": 2, "pug": 2})
    command = ["evaluate", tmp_path / "run", "--images", folder]
    capsys.readouterr()
    assert "--weights FILE" in refused(capsys, *command)
    assert run_cli(*command, "--weights", new) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["explode"],
        ["extract"],
        ["extract", "--out", "run", "--preset", "huge"],
        ["extract", "--out", "run", "--seed", "one"],
        ["evaluate"],
    ],
)
def test_a_command_that_cannot_be_read_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moee")
    assert "What to do: " in line


def test_an_interruption_is_a_failure_without_a_traceback(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moee_analysis.models.loading.load_model", stop)
    assert run_cli(*EXTRACT, "--out", tmp_path / "run") == 1
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lab_passes_options_on_and_other_commands_refuse_strange_ones(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(report, "open_lab", lambda options: given.append(options) or 0)
    assert cli.main(["lab", "--no-browser", "--port", "8899"]) == 0
    assert given == [["--no-browser", "--port", "8899"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-browser"])
    assert ended.value.code == 2
    assert "--no-browser" in capsys.readouterr().err


def test_smaller_heads_are_told(tmp_path, capsys, monkeypatch):
    from moee_analysis.data import images

    monkeypatch.setitem(images.scenes.SPLIT_SIZES, "calibration", 40)
    command = ["extract", "--recipe", "best", "--preset", "smoke", "--macs-reduction", "0.3"]
    assert run_cli(*command, "--attention", "low_rank", "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("of the dimensions of the heads' scores" in line for line in lines) == 12
    assert "asked for 1 token(s)" in next(line for line in lines if "blocks.11.attn" in line)


def test_finetune_makes_a_run_that_can_be_evaluated(told, tmp_path, capsys, monkeypatch):
    root, before = told
    monkeypatch.setenv("MOEE_HEADLESS", "1")
    seen = scenes(tmp_path / "seen", split="train")
    command = ["finetune", root / "run", "--images", seen, "--out", tmp_path / "tuned"]
    command += ["--epochs", 3, "--learning-rate", 1e-4, "--held-out", 0.4, "--batch-size", 8]
    command += ["--augmentation", "none", "--seed", 3]
    assert run_cli(*command) == 0
    out = capsys.readouterr().out
    assert "held out" in out
    assert f"saved to {tmp_path / 'tuned'}" in out
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [
        "curve.png", "metrics.csv", "model.safetensors", "run.json",
    ]  # fmt: skip
    numbers = tmp_path / "numbers.json"
    assert (
        run_cli("evaluate", tmp_path / "tuned", "--images", root / "scenes", "--json", numbers) == 0
    )
    after = json.loads(numbers.read_text())
    assert after["kl"] < before["kl"]
    assert after["provenance"]["finetunings"][0]["config"]["seed"] == 3
    assert run_cli(*command) == 0  # it has ended
    assert "another folder" in refused(capsys, *command, "--epochs", 2)
    told = refused(capsys, "evaluate", tmp_path / "tuned", "--images", seen)
    assert "60 that are" in told
    assert "trained on" in told


def test_finetune_refuses_what_is_wrong_in_one_line(told, tmp_path, capsys):
    command = ["finetune", told[0] / "run", "--out", tmp_path / "tuned"]
    assert "epochs" in refused(capsys, *command, "--epochs", 0)
    assert "router" in refused(capsys, *command, "--router", "melted")
    assert "toaster" in refused(capsys, *command, "--device", "toaster")
    assert "class folders" in refused(capsys, *command, "--images", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def few_scenes(monkeypatch):
    from moee_analysis.data import images

    monkeypatch.setitem(images.scenes.SPLIT_SIZES, "calibration", 40)
    monkeypatch.setitem(images.scenes.SPLIT_SIZES, "evaluation", 30)


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
    assert "argument --seeds" in refused(capsys, "compare", "--seeds", 0)
    assert "argument --macs-reduction" in refused(capsys, "compare", "--macs-reduction", 0.2, 1.5)
    assert "a folder" in refused(capsys, "compare", "--json", tmp_path)
    assert "not used for calibration" in refused(
        capsys, "compare", "--calibration", scenes(tmp_path / "a"), "--images", tmp_path / "a"
    )


# Models and classes of one's own


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


def extracted(own, *options):
    return [
        "extract", "--model", SMALL_VIT, "--weights", own / "tuned.pth", "--reduce", "pca",
        "--calibration", own / "calibration", "--preset", "smoke", *options,
    ]  # fmt: skip


def test_a_tuned_model_is_named_by_its_folders_and_evaluated(own, tmp_path, capsys):
    classes._tell_once.cache_clear()
    assert run_cli(*extracted(own, "--out", tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "from behind the prefix 'module.'" in out
    assert "the 3 class folders in the order of the alphabet, ant, yak, zebra" in out
    for images, number in (("evaluation", 15), ("one_class", 6)):
        command = ["evaluate", tmp_path / "run", "--images", own / images]
        assert run_cli(*command, "--json", tmp_path / "n.json") == 0
        assert json.loads((tmp_path / "n.json").read_text())["n_images"] == number
    page = tmp_path / "atlas.html"
    assert run_cli("atlas", tmp_path / "run", "--images", own / "evaluation", "--out", page) == 0
    assert "zebra" in page.read_text()


def test_its_classes_can_be_given_at_once_or_later(own, tmp_path):
    given = ["--classes", own / "classes.txt"]
    named, unnamed = tmp_path / "named", tmp_path / "unnamed"
    assert run_cli(*extracted(own, *given, "--out", named)) == 0
    assert run_cli(*extracted(own, "--out", unnamed)) == 0
    numbers = []
    written = ["--images", own / "evaluation", "--json", tmp_path / "n.json"]
    for run in ([named], [unnamed, *given], [unnamed]):
        assert run_cli("evaluate", *run, *written) == 0
        numbers.append(json.loads((tmp_path / "n.json").read_text()))
    assert numbers[0]["dense_top1"] == numbers[1]["dense_top1"] != numbers[2]["dense_top1"]


def test_classes_that_do_not_fit_are_refused_before_anything_is_computed(own, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    command = extracted(own, "--classes", tmp_path / "two.txt", "--out", tmp_path / "run")
    assert "each of the model's 3 outputs; found 2" in refused(capsys, *command)
    command = ["compare", "--model", SMALL_VIT, "--weights", own / "tuned.pth"]
    command += ["--calibration", own / "calibration", "--images", own / "one_class"]
    assert "--classes FILE" in refused(capsys, *command)
    command = [
        "report",
        "--model",
        SMALL_VIT,
        "--weights",
        own / "tuned.pth",
        "--out",
        tmp_path / "r",
    ]
    assert "--classes FILE" in refused(capsys, *command, "--images", own / "one_class")
    assert not (tmp_path / "r").exists()


def test_calibration_pictures_are_not_evaluated(own, tmp_path, capsys):
    assert run_cli(*extracted(own, "--out", tmp_path / "run")) == 0
    told = refused(capsys, "evaluate", tmp_path / "run", "--images", own / "calibration")
    assert "36 that are" in told
    assert "--images DIR" in told


def test_a_model_of_another_size_and_one_channel(tmp_path, own, capsys):
    torch.save(lively(num_classes=3, in_chans=1, img_size=96).state_dict(), tmp_path / "w.pth")
    command = extracted(own, "--out", tmp_path / "run")
    command[command.index(own / "tuned.pth")] = tmp_path / "w.pth"
    assert run_cli(*command, "--img-size", 96, "--in-chans", 1) == 0
    assert "resampled" not in capsys.readouterr().out
    numbers = tmp_path / "n.json"
    command = ["evaluate", tmp_path / "run", "--images", own / "evaluation", "--json", numbers]
    assert run_cli(*command) == 0
    expected = count(lively(num_classes=3, in_chans=1, img_size=96)).total
    assert json.loads(numbers.read_text())["macs_dense"] == expected


def test_a_place_that_cannot_be_written_is_told_at_once(own, told, tmp_path, capsys, monkeypatch):
    root, place = told[0], tmp_path / "read_only"
    place.mkdir()

    def trial(prefix, dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", trial)
    for name in ("load_model", "find_mlps"):
        monkeypatch.setattr(
            f"moee_analysis.models.loading.{name}", lambda *_, **__: pytest.fail("late")
        )
    images = ["--images", own / "evaluation"]
    for command in (
        extracted(own, "--out", place / "run"),
        ["evaluate", root / "run", *images, "--json", place / "n.json"],
        ["compare", "--json", place / "n.json"],
        ["atlas", root / "run", *images, "--out", place / "atlas.html"],
        ["finetune", root / "run", *images, "--out", place / "tuned"],
        ["report", "--out", place / "report", "--preset", "smoke"],
    ):
        told_line = refused(capsys, *command)
        assert f"Permission denied: '{place}'" in told_line
        assert "choose a place" in told_line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--img-size", 100], "3 x 100 x 100"), (["--in-chans", 0], "--in-chans"),
        (["--device", "meta"], "a device such as cpu"), (["--store", "/proc/none"], "--store"),
    ],
)  # fmt: skip
def test_what_cannot_end_well_is_not_begun(own, tmp_path, capsys, options, told):
    assert told in refused(capsys, *extracted(own, *options, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
