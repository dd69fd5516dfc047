"""Labelled images: which class a folder is, choosing among images, batches for a model."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.data.images import load_images
from moee_analysis.data.scenes.scene import CLASSES
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import build_model, load_model, model_transform
from tests.helpers.images import image_folder, picture, toy_images
from tests.helpers.models import SMALL_VIT, toy_vit

BUNDLED = build_model("bundled")
IMAGENET = build_model(SMALL_VIT)


# Which class a folder is


def test_wnid_folders_map_to_the_models_own_indices(tmp_path):
    folder = image_folder(tmp_path, {"n02917067": 2, "n01443537": 1, "n09246464": 1})
    images = load_images(folder)
    assert images.folders == ("n01443537", "n02917067", "n02917067", "n09246464")
    assert images.labels(IMAGENET).tolist() == [1, 466, 466, 972]
    assert images.labels(IMAGENET).dtype == np.int64


@pytest.mark.parametrize(("name", "model", "label"), [
    ("goldfish", IMAGENET, 1), ("Goldfish", IMAGENET, 1), ("bullet train", IMAGENET, 466),
    ("bullet_train", IMAGENET, 466),
    *[(name, BUNDLED, CLASSES.index("fire_engine"))
      for name in ("fire_engine", "fire engine", "Fire-Engine")],
])  # fmt: skip
def test_folders_may_have_readable_names(tmp_path, name, model, label):
    assert load_images(image_folder(tmp_path, {name: 1})).labels(model).tolist() == [label]


@pytest.mark.parametrize("name", ["dragon", "crane"])  # unknown; the bird or the machine
def test_an_unknown_or_ambiguous_folder_is_refused_by_name(tmp_path, name):
    images = load_images(image_folder(tmp_path, {"n01443537": 1, name: 1}))
    with pytest.raises(MoeeError, match=f"1 unknown or ambiguous: {name}") as error:
        images.labels(IMAGENET)
    assert "n01440764" in error.value.expected


def test_names_need_not_be_english(tmp_path):
    images, model = load_images(image_folder(tmp_path, {"пёс": 1, "猫": 1})), toy_vit()
    model.reset_classifier(2)
    model.pretrained_cfg["label_names"] = ("猫", "пёс")
    assert sorted(images.labels(model)) == [0, 1]


# What is read from a folder


def test_pictures_are_found_at_any_depth_and_other_files_left_alone(tmp_path):
    image_folder(tmp_path, {"ant": 1})
    (tmp_path / "ant" / "more").mkdir()
    picture(1).save(tmp_path / "ant" / "more" / "a.JPEG")
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    picture(2).save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match="skipped 2 files") as caught:
        images = load_images(tmp_path)
    assert images.folders == ("ant", "ant")
    text = "1 no image (.txt): ant/notes.txt; 1 in no class folder: loose.png"
    assert images.skipped_text == text
    assert text in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.fixture
def damaged(tmp_path):
    """Six pictures, three of which cannot be read."""
    folder = image_folder(tmp_path / "photos", {"ant": 3, "bee": 3})
    (folder / "ant" / "0.png").write_bytes(b"")
    (folder / "ant" / "1.png").write_bytes(b"<html>404</html>")
    for path in (folder / "bee" / "2.png", tmp_path / "photograph.jpg"):
        picture(1, size=400).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "photograph.jpg").rename(folder / "bee" / "z.jpg")
    return folder


def test_unreadable_pictures_are_skipped_and_named_or_refused(damaged):
    with pytest.warns(UserWarning, match="skipped 4 files") as caught:
        images = load_images(damaged)
    assert "ant/0.png, ant/1.png; 2 damaged" in str(caught[0].message)
    assert images.skipped == ("ant/0.png", "ant/1.png", "bee/2.png", "bee/z.jpg")
    assert images.folders == ("ant", "bee", "bee")
    assert len(torch.cat(list(images.batches(toy_vit())))) == 3
    with pytest.raises(MoeeError, match=r"4 unreadable: .*: ant/0\.png"):
        load_images(damaged, strict=True)
    shutil.rmtree(damaged / "bee")
    (damaged / "ant" / "2.png").write_bytes(b"")
    with pytest.raises(MoeeError, match="3 unreadable"):
        load_images(damaged)


def test_a_folder_without_images_is_told_how_to_arrange(tmp_path):
    for folder in (tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(MoeeError, match="no folder"):
            load_images(folder)
    with pytest.raises(MoeeError, match="<wnid or class name>/<image>"):
        load_images(tmp_path)
    picture(0).save(tmp_path / "flat.png")
    with pytest.raises(MoeeError, match=r"1 in no class folder: flat\.png.*<wnid or class name>"):
        load_images(tmp_path)


def test_photographs_have_no_part_masks(tmp_path):
    images = load_images(image_folder(tmp_path, {"ant": 1}))
    assert images.parts == ()
    with pytest.raises(MoeeError, match="only the bundled scenes"):
        images.mask(0)


def test_the_bundled_splits_differ_and_know_their_parts():
    one, other = (load_images(split=split, limit=40) for split in ("calibration", "evaluation"))
    assert np.bincount(one.labels(BUNDLED)).tolist() == [2] * 20
    assert one.fingerprint != other.fingerprint
    assert one.mask(0).shape == (64, 64)
    assert one.mask(0).max() < len(one.parts)
    for split in ("test", [], None):
        with pytest.raises(MoeeError, match="calibration, evaluation"):
            load_images(split=split)


# Choosing among images


def test_a_limit_is_even_over_the_classes_and_keeps_the_order():
    images = toy_images(60)
    few = images.limit(12, seed=1)
    assert np.unique(few.labels(toy_vit()), return_counts=True)[1].tolist() == [2] * 6
    assert list(few.rows) == sorted(few.rows)
    assert few.rows == images.limit(12, seed=1).rows
    assert few.rows != images.limit(12, seed=2).rows
    assert images.limit(None) is images.limit(1000) is images


def test_a_split_shares_nothing_and_loses_nothing():
    images = toy_images(30)
    one, other = images.split(0.4, seed=3)
    assert len(one) == 12
    assert sorted(one.rows + other.rows) == list(images.rows)
    assert np.bincount(one.labels(toy_vit())).tolist() == [2] * 6
    for share in (math.nan, math.inf, "3", -0.1, 1.5, None):
        with pytest.raises(MoeeError, match="share as a number at least 0 and at most 1"):
            images.split(share)


def test_classes_can_be_chosen_by_name():
    assert set(toy_images(12).of_classes(["Bee", "fox"]).folders) == {"bee", "fox"}


def test_the_fingerprint_is_of_contents_classes_and_order(tmp_path):
    image_folder(tmp_path / "a", {"ant": 2, "bee": 1})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, same = load_images(tmp_path / "a"), load_images(tmp_path / "b")
    assert one.fingerprint == same.fingerprint
    picture(77).save(tmp_path / "b" / "bee" / "0.png")
    others = [load_images(tmp_path / "b"), one.take([1, 0, 2]),
              replace(one, folders=("ant", "bee", "bee"))]  # fmt: skip
    assert one.fingerprint not in [other.fingerprint for other in others]


# As a model sees them


def test_batches_are_the_images_in_order_as_the_model_wants_them():
    images, model = toy_images(7), toy_vit()
    batches = list(images.batches(model, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    transform = model_transform(model)
    wanted = torch.stack([transform(images.picture(i)) for i in range(7)])
    assert torch.equal(torch.cat(batches), wanted)
    assert list(images.take([]).batches(model)) == []
    for size in (None, 0):
        assert len(next(images.batches(model, batch_size=size))) == 7
    for size in (-1, "3", math.nan, 1.5, True):
        with pytest.raises(MoeeError, match="batch_size as a whole number"):
            next(images.batches(model, batch_size=size))


def test_as_seen_is_what_the_model_gets_before_it_is_normalised():
    images, model = load_images("bundled", limit=2), load_model("bundled")
    seen = images.as_seen(1, model)
    assert seen.dtype == np.uint8
    normalised = next(images.batches(model))[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen / 255, normalised * 0.5 + 0.5, atol=1e-6)
