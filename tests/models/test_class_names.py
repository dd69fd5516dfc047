import json

import pandas as pd
import pytest
import torch
from torch import nn

from moee_analysis import measure
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.class_names import (
    class_labels,
    class_names,
    count_classes,
    name_by_folders,
    name_classes,
    read_class_names,
)
from moee_analysis.models.loading import load_model
from tests.helpers.images import image_folder, toy_images
from tests.helpers.models import CLASSES, SMALL_VIT, TINY, lively
from tests.helpers.runs import best, quick

ANIMALS = ("zebra", "ant", "yak")


def named(names):
    model = lively(num_classes=len(names))
    name_classes(model, names)
    return model


def with_head(*modules):
    model = lively(**TINY)
    model.head = nn.Sequential(*modules) if len(modules) > 1 else modules[0]
    return model


# A file of names


@pytest.mark.parametrize(("name", "text"), [
    ("c.txt", "zebra\nant\n\nyak\n"), ("c.txt", "\ufeffzebra\r\n ant \r\nyak"),
    ("c.json", '["zebra", "ant", "yak"]'), ("c.txt", '["zebra", "ant", "yak"]'),
    ("c.json", '{"1": "ant", "0": "zebra", "2": "yak"}'),
    ("c.json", '{"ant": 1, "zebra": 0, "yak": 2}'),
    ("config.json", '{"hidden": 3, "id2label": {"0": "zebra", "1": "ant", "2": "yak"}}'),
])  # fmt: skip
def test_names_are_one_a_line_or_json(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name) == ANIMALS


@pytest.mark.parametrize("text", ["", "\n", "{", "[1, 2]", "{}", '{"0": "a", "2": "b"}', "3", "[]"])
def test_other_content_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(MoeeError, match="one name a line, or JSON"):
        read_class_names(tmp_path / "c.json")
    with pytest.raises(MoeeError, match="no such file"):
        read_class_names(tmp_path / "missing.txt")


def test_a_model_is_loaded_with_its_own_classes(tmp_path):
    torch.save(lively(num_classes=3).state_dict(), tmp_path / "w.pth")
    (tmp_path / "c.txt").write_text("\n".join(ANIMALS))
    for given in (tmp_path / "c.txt", str(tmp_path / "c.txt"), ANIMALS):
        model = load_model(SMALL_VIT, weights=tmp_path / "w.pth", classes=given)
        assert class_names(model) == class_labels(model) == ANIMALS
    with pytest.raises(MoeeError, match="each of the model's 3 outputs; found 2"):
        load_model(SMALL_VIT, weights=tmp_path / "w.pth", classes=["a", "b"])
    with pytest.raises(MoeeError, match="more than once"):
        load_model(SMALL_VIT, weights=tmp_path / "w.pth", classes=["a", "b", "b"])


# The class folders as names


def test_as_many_folders_as_outputs_name_them_in_their_order(tmp_path, capsys):
    model = lively(num_classes=4)
    images = load_images(image_folder(tmp_path, dict.fromkeys((*ANIMALS, "eel"), 2)))
    assert images.labels(model).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert images.of_classes(["zebra"]).labels(model).tolist() == [3, 3]
    assert "taken to be the 4 class folders" in capsys.readouterr().out
    with pytest.raises(MoeeError, match="without names"):
        class_names(model)
    name_by_folders(model, images.classes)
    assert class_names(model) == ("ant", "eel", "yak", "zebra")
    with pytest.raises(MoeeError, match="--classes FILE"):  # another number of folders
        images.labels(lively(num_classes=5))


def test_names_of_a_run_stay_with_it_whatever_is_given_and_stored(tmp_path):
    images = load_images(image_folder(tmp_path / "a", {"aa": 4, "bb": 4}))
    config = quick(experts="one")
    plain, named = (lively(num_classes=2, **TINY) for _ in range(2))
    name_classes(named, ["bb", "aa"])
    extract(named, images, config).save(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["model"]["pretrained_cfg"]["label_names"] == ["bb", "aa"]
    for dense in (None, plain):
        assert class_names(load(tmp_path / "run", dense=dense).model) == ("bb", "aa")
    for _ in range(2):
        stored = extract(plain, images, config, store=tmp_path / "store")
        assert class_names(stored.model) == ("aa", "bb")  # that its folders gave
    few = load_images(image_folder(tmp_path / "b", {"bb": 4}, first=50))
    assert few.labels(stored.model).tolist() == [1] * 4


@pytest.mark.parametrize("names", [("A", "a"), ("C#", "C++"), ("+1", "-1")])
def test_folders_that_differ_in_case_or_signs_are_told_apart(tmp_path, names):
    images = load_images(image_folder(tmp_path, dict.fromkeys(names, 2)))
    model = lively(num_classes=2)
    expected = [0, 0, 1, 1]
    assert images.labels(model).tolist() == expected
    name_classes(model, names[::-1])
    assert images.labels(model).tolist() == [1 - label for label in expected]
    assert len(images.of_classes(names[:1])) == 2


def test_names_that_were_stated_stay(tmp_path):
    model = named(ANIMALS)
    images = load_images(image_folder(tmp_path, dict.fromkeys(ANIMALS, 1)))
    name_by_folders(model, images.classes)
    assert class_names(model) == ANIMALS
    assert sorted(images.labels(model).tolist()) == [0, 1, 2]
    assert images.of_classes(["zebra"]).labels(model).tolist() == [0]


# Heads without these classes


HEADS = {
    "another size": lambda: with_head(nn.Linear(64, 10)),
    "none": lambda: lively(num_classes=0, **TINY),
    "none by hand": lambda: with_head(nn.Identity()),
    "a regression": lambda: lively(num_classes=1, **TINY),
    "a regression by hand": lambda: with_head(nn.Linear(64, 1)),
    "a number an image": lambda: with_head(nn.Linear(64, 1), nn.Flatten(0)),
}


@pytest.mark.parametrize("head", HEADS)
def test_no_accuracy_is_computed_against_labels_of_others(tmp_path, head):
    images = load_images(image_folder(tmp_path, {"n02917067": 2, "n01443537": 2}))
    with pytest.raises(MoeeError) as error:
        measure.accuracy(HEADS[head](), images, resamples=10)
    assert "classes" in str(error.value)
    assert "labels" in error.value.hint or "--classes" in error.value.hint


@pytest.mark.parametrize("head", HEADS)
def test_all_that_needs_no_labels_works(tmp_path, head):
    images = load_images(image_folder(tmp_path / "p", {"n02917067": 4, "n01443537": 4}))
    model = HEADS[head]()
    paper = head != "a number an image"
    run = extract(model, images, quick() if paper else best(macs_reduction=0.2))
    assert len(measure.routing(run, images))
    assert not paper or len(measure.similarity(run))
    assert len(measure.macs(run, images))
    table = measure.agreement(run.model, images, reference=run.dense()).iloc[0]
    assert 0 < table["cosine"] <= 1
    assert table["error"] >= 0
    assert pd.notna(table["agreement"]) == pd.notna(table["kl"]) == (head == "another size")
    run.save(tmp_path / "run")
    loaded = load(tmp_path / "run", dense=model)
    assert measure.agreement(loaded.model, images, reference=run.model)["error"].item() < 1e-5


def test_models_of_different_outputs_are_not_compared():
    with pytest.raises(MoeeError, match="6 and 7 outputs"):
        measure.accuracy({"a": lively(num_classes=7)}, toy_images(4), reference=named(CLASSES))


def test_outputs_are_counted_as_they_are():
    assert count_classes(with_head(nn.Linear(64, 10))) == 10
    assert count_classes(lively(num_classes=7)) == 7
    assert count_classes(lively("deit_tiny_distilled_patch16_224", num_classes=5)) == 5
    assert len(class_names(lively())) == 1000
