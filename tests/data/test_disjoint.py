from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from moee_analysis.data.disjoint import check_disjoint, contents_of, without_repeats
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.extraction.saving.run_files import FACTS, _checksum
from moee_analysis.measure.evaluation.comparison import Contest
from moee_analysis.measure.evaluation.evaluate import evaluate
from moee_analysis.report.notebook.image_sets import choose_images
from moee_analysis.report.notebook.parameters import Parameters
from moee_analysis.training.finetune import finetune
from tests.helpers.images import image_folder, toy_images
from tests.helpers.models import CLASSES, lively
from tests.helpers.runs import quick
from tests.training.test_finetune import tuning


@pytest.fixture
def two(tmp_path):
    """Two folders of pictures, one of which is in both under other names and kinds."""
    ours = image_folder(tmp_path / "ours", dict.fromkeys(CLASSES, 2))
    theirs = image_folder(tmp_path / "theirs", dict.fromkeys(CLASSES, 2), first=50)
    Image.open(ours / "ant" / "0.png").save(theirs / "dog" / "renamed.bmp")
    return load_images(ours), load_images(theirs)


def test_the_same_pixels_are_the_same_picture(two):
    with pytest.raises(MoeeError, match=r"1 that are, such as .*dog/renamed\.bmp"):
        check_disjoint(*two, use="used for calibration")
    ours, theirs = two
    check_disjoint(ours, theirs.of_classes(["eel", "fox"]), use="used for calibration")
    assert len(set(contents_of(ours)) & set(contents_of(theirs))) == 1


def test_the_comparison_refuses_it(two):
    model = lively(num_classes=6)
    with pytest.raises(MoeeError, match="used for calibration"):
        Contest(model, *two)


def test_evaluating_a_run_refuses_it_saved_or_not(two, tmp_path):
    ours, theirs = two
    run = extract(lively(num_classes=6), ours, quick())
    run.save(tmp_path / "run")
    for same in (run, load(tmp_path / "run")):
        with pytest.raises(MoeeError, match="used for calibration"):
            evaluate(same, theirs)
    numbers = evaluate(run, theirs.of_classes(["ant", "bee", "cat", "eel", "fox"]))
    assert "contents" not in json.dumps(numbers)


def test_evaluating_a_run_refuses_what_it_was_tuned_on():
    run = extract(lively(num_classes=6), toy_images(24), quick())
    training = toy_images(60).take(range(30, 60))
    tuned = finetune(run, training, tuning(epochs=1)).run
    with pytest.raises(MoeeError, match="30 that are"):
        evaluate(tuned, toy_images(60).take(range(28, 60)))
    with pytest.raises(MoeeError, match="trained on"):
        evaluate(tuned, training)
    assert evaluate(run, training)["n_images"] == 30


def test_of_an_older_run_the_whole_set_is_known(tmp_path):
    images = toy_images(24)
    extract(lively(num_classes=6), images, quick()).save(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / FACTS).read_text())
    del facts["provenance"]["contents"], facts["checksum"]
    (tmp_path / "run" / FACTS).write_text(json.dumps(facts | {"checksum": _checksum(facts)}))
    with pytest.raises(MoeeError, match="the same set"):
        evaluate(load(tmp_path / "run"), images)


def test_notebooks_refuse_two_folders_that_share_pictures(two, tmp_path):
    given = Parameters(
        model="vit", calibration=str(tmp_path / "ours"), images=str(tmp_path / "theirs")
    )
    with pytest.raises(MoeeError, match="used for calibration"):
        choose_images(given)


def test_a_notebook_counts_a_picture_once_that_is_there_twice(tmp_path):
    folder = image_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 2))
    for path in list(folder.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    sets = choose_images(Parameters(model="vit", images=str(folder), preset="smoke"))
    both = [set(contents_of(images)) for images in (sets.calibration, sets.evaluation)]
    assert not both[0] & both[1]
    assert sum(map(len, both)) == len(sets.calibration) + len(sets.evaluation) == 12
    assert "12 images are there twice and count once." in sets.notes


def test_repeats_are_left_out_and_told(capsys):
    images = toy_images(6).take([0, 1, 0, 2, 1])
    assert without_repeats(images).rows == (0, 1, 2)
    assert "2 of the 5 images" in capsys.readouterr().out
    assert without_repeats(toy_images(6)).rows == tuple(range(6))


def test_tuning_holds_out_no_picture_that_it_trains_on():
    run = extract(lively(num_classes=6), toy_images(24), quick())
    twice = toy_images(60).take([*range(30, 50), *range(30, 50)])
    tuned = finetune(run, twice, tuning(epochs=1))
    (facts,) = tuned.run.provenance["finetunings"]
    assert facts["n_images"] + facts["n_held_out"] == 20


def test_the_bundled_splits_share_no_scene():
    calibration, evaluation = (
        load_images(split=s, limit=60) for s in ("calibration", "evaluation")
    )
    check_disjoint(calibration, evaluation, use="used for calibration")
