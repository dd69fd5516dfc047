"""No picture that something was made from is one that it is measured on."""

import json
import shutil

import pytest
from PIL import Image

import moee_analysis as moee
from moee_analysis.data.disjoint import check_disjoint, contents_of, without_repeats
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.evaluate import evaluate
from moee_analysis.report.notebook.parameters import Parameters, choose_images
from moee_analysis.utils.storage.files import checksum
from tests.helpers.images import image_folder, toy_images
from tests.helpers.models import CLASSES, lively
from tests.helpers.runs import quick

REFUSED = pytest.raises(MoeeError, match="used for calibration")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two folders of pictures, one of which is in both under other names and kinds."""
    root = tmp_path_factory.mktemp("folders")
    ours = image_folder(root / "ours", dict.fromkeys(CLASSES, 2))
    theirs = image_folder(root / "theirs", dict.fromkeys(CLASSES, 2), first=50)
    Image.open(ours / "ant" / "0.png").save(theirs / "dog" / "renamed.bmp")
    return load_images(ours), load_images(theirs)


@pytest.fixture(scope="module")
def run(two):
    return moee.extract(lively(num_classes=6), two[0], quick())


def test_the_same_pixels_are_the_same_picture(two):
    with pytest.raises(MoeeError, match=r"1 that are, such as .*dog/renamed\.bmp"):
        check_disjoint(*two, use="used for calibration")
    ours, theirs = two
    check_disjoint(ours, theirs.of_classes(["eel", "fox"]), use="used for calibration")
    assert len(set(contents_of(ours)) & set(contents_of(theirs))) == 1
    splits = (load_images(split=split, limit=40) for split in ("calibration", "evaluation"))
    check_disjoint(*splits, use="used for calibration")


def test_evaluating_and_notebooks_refuse_it_of_an_older_run_the_whole_set(two, run, tmp_path):
    folders = [str(images.source.paths[0].parents[1]) for images in two]
    with REFUSED:
        choose_images(Parameters(model="vit", calibration=folders[0], images=folders[1]))
    run.save(tmp_path / "run")
    for same in (run, moee.load(tmp_path / "run")):
        with REFUSED:
            evaluate(same, two[1])
    assert "contents" not in json.dumps(evaluate(run, two[1].of_classes(["bee", "eel", "fox"])))
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    del facts["provenance"]["contents"], facts["checksum"]
    path.write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    with pytest.raises(MoeeError, match="the same set"):
        evaluate(moee.load(tmp_path / "run"), two[0])


def test_tuning_holds_out_no_picture_that_it_trains_on_and_knows_them(run):
    images, config = toy_images(40), moee.FinetuneConfig(epochs=1, batch_size=8)
    tuned = moee.finetune(run, images.take([*range(20, 30), *range(20, 30)]), config).run
    (facts,) = tuned.provenance["finetunings"]
    assert facts["n_images"] + facts["n_held_out"] == 10
    with pytest.raises(MoeeError, match="trained on; found 10 that are"):
        evaluate(tuned, images.take(range(18, 40)))
    assert evaluate(run, images.take(range(20, 40)))["n_images"] == 20


def test_a_picture_that_is_there_twice_counts_once(tmp_path, capsys):
    images = toy_images(6).take([0, 1, 0, 2, 1])
    assert without_repeats(images).rows == (0, 1, 2)
    assert "2 of the 5 images" in capsys.readouterr().out
    assert without_repeats(toy_images(6)).rows == tuple(range(6))
    folder = image_folder(tmp_path / "photos", dict.fromkeys(CLASSES, 2))
    for path in list(folder.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"copy_of_{path.name}"))
    sets = choose_images(Parameters(model="vit", images=str(folder), preset="smoke"))
    both = [set(contents_of(images)) for images in (sets.calibration, sets.evaluation)]
    assert not both[0] & both[1]
    assert sum(map(len, both)) == len(sets.calibration) + len(sets.evaluation) == 12
    assert "12 images are there twice and count once." in sets.notes
