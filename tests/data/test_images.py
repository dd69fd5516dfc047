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


def named(names) -> torch.nn.Module:
    """A model whose classes have these names."""
    model = toy_vit()
    model.reset_classifier(len(names))
    model.pretrained_cfg["label_names"] = tuple(names)
    return model


# Which class a folder is


def test_wnid_folders_map_to_the_models_own_indices(tmp_path):
    folder = image_folder(tmp_path, {"n02917067": 2, "n01443537": 1, "n09246464": 1})
    images = load_images(folder)
    assert images.folders == ("n01443537", "n02917067", "n02917067", "n09246464")
    assert images.labels(IMAGENET).tolist() == [1, 466, 466, 972]
    assert images.labels(IMAGENET).dtype == np.int64


@pytest.mark.parametrize("name", ["goldfish", "Goldfish", "bullet train", "bullet_train"])
def test_folders_may_have_readable_names(tmp_path, name):
    index = 466 if "train" in name else 1
    images = load_images(image_folder(tmp_path, {name: 1}))
    assert images.labels(IMAGENET).tolist() == [index]


@pytest.mark.parametrize("name", ["fire_engine", "fire engine", "Fire-Engine"])
def test_bundled_classes_are_found_by_name(tmp_path, name):
    images = load_images(image_folder(tmp_path, {name: 1}))
    assert images.labels(BUNDLED).tolist() == [CLASSES.index("fire_engine")]


def test_an_unknown_folder_is_refused_by_name(tmp_path):
    images = load_images(image_folder(tmp_path, {"n01443537": 1, "dragon": 1}))
    with pytest.raises(MoeeError, match="1 unknown or ambiguous: dragon") as error:
        images.labels(IMAGENET)
    assert "n01440764" in error.value.expected


def test_a_name_of_two_classes_is_refused(tmp_path):
    images = load_images(image_folder(tmp_path, {"crane": 1}))  # the bird or the machine
    with pytest.raises(MoeeError, match="ambiguous: crane"):
        images.labels(IMAGENET)


def test_names_need_not_be_english(tmp_path):
    images = load_images(image_folder(tmp_path, {"пёс": 1, "猫": 1}))
    assert sorted(images.labels(named(["猫", "пёс"]))) == [0, 1]


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
    told = "1 no image (.txt): ant/notes.txt; 1 in no class folder: loose.png"
    assert images.skipped_text == told
    assert told in str(caught[0].message)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_picture_becomes_rgb(tmp_path, mode):
    (tmp_path / "ant").mkdir()
    grey = picture(0, mode="L")
    made = grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)
    made.save(tmp_path / "ant" / "a.tif")
    images = load_images(tmp_path)
    assert images.picture(0).mode == "RGB"
    assert next(images.batches(toy_vit())).shape == (1, 3, 32, 32)


@pytest.fixture
def damaged(tmp_path):
    """Six pictures, three of which cannot be read."""
    folder = image_folder(tmp_path / "photos", {"ant": 3, "bee": 3})
    (folder / "ant" / "0.png").write_bytes(b"")
    (folder / "ant" / "1.png").write_bytes(b"<html>404</html>")
    whole = (folder / "bee" / "2.png").read_bytes()
    (folder / "bee" / "2.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_unreadable_pictures_are_skipped_and_named(damaged):
    with pytest.warns(UserWarning, match="skipped 3 files") as caught:
        images = load_images(damaged)
    assert "ant/0.png, ant/1.png; 1 damaged" in str(caught[0].message)
    assert images.skipped == ("ant/0.png", "ant/1.png", "bee/2.png")
    assert images.folders == ("ant", "bee", "bee")
    assert len(torch.cat(list(images.batches(toy_vit())))) == 3


def test_a_truncated_photograph_is_skipped(tmp_path):
    image_folder(tmp_path, {"ant": 1})
    picture(1, size=400).save(tmp_path / "ant" / "z.jpg")
    whole = (tmp_path / "ant" / "z.jpg").read_bytes()
    (tmp_path / "ant" / "z.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"ant/z\.jpg"):
        assert len(load_images(tmp_path)) == 1


def test_strict_refuses_unreadable_pictures(damaged):
    with pytest.raises(MoeeError, match=r"3 unreadable: .*: ant/0\.png"):
        load_images(damaged, strict=True)


def test_nothing_readable_is_refused_even_if_not_strict(damaged):
    shutil.rmtree(damaged / "bee")
    (damaged / "ant" / "2.png").write_bytes(b"")
    with pytest.raises(MoeeError, match="3 unreadable"):
        load_images(damaged)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(MoeeError, match="no folder"):
        load_images(tmp_path / "missing")


@pytest.mark.parametrize("loose", [False, True])
def test_a_folder_without_class_folders_is_told_how_to_arrange(tmp_path, loose):
    if loose:
        picture(0).save(tmp_path / "a.png")
    with pytest.raises(MoeeError, match="<wnid or class name>/<image>"):
        load_images(tmp_path)


def test_photographs_have_no_part_masks(tmp_path):
    images = load_images(image_folder(tmp_path, {"ant": 1}))
    assert images.parts == ()
    with pytest.raises(MoeeError, match="only the bundled scenes"):
        images.mask(0)


# The bundled scenes


def test_the_bundled_splits_differ_and_know_their_parts():
    calibration, evaluation = (
        load_images(split=split, limit=40) for split in ("calibration", "evaluation")
    )
    assert np.bincount(calibration.labels(BUNDLED)).tolist() == [2] * 20
    assert calibration.fingerprint != evaluation.fingerprint
    assert calibration.mask(0).shape == (64, 64)
    assert calibration.mask(0).max() < len(calibration.parts)


def test_an_unknown_split_is_refused():
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


@pytest.mark.parametrize("share", [math.nan, math.inf, "3", -0.1, 1.5, None])
def test_what_is_no_share_of_the_images_is_refused(share):
    with pytest.raises(MoeeError, match="share as a number at least 0 and at most 1"):
        toy_images(6).split(share)


@pytest.mark.parametrize("size", [-1, "3", math.nan, 1.5, True])
def test_what_is_no_size_of_a_batch_is_refused(size):
    with pytest.raises(MoeeError, match="batch_size as a whole number"):
        next(toy_images(6).batches(toy_vit(), batch_size=size))


def test_batches_of_no_given_size_fit_the_model():
    for size in (None, 0):
        assert len(next(toy_images(6).batches(toy_vit(), batch_size=size))) == 6


def test_classes_can_be_chosen_by_name():
    assert set(toy_images(12).of_classes(["Bee", "fox"]).folders) == {"bee", "fox"}


def test_batches_are_the_images_in_order_as_the_model_wants_them():
    images, model = toy_images(7), toy_vit()
    batches = list(images.batches(model, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    transform = model_transform(model)
    wanted = torch.stack([transform(images.picture(i)) for i in range(7)])
    assert torch.equal(torch.cat(batches), wanted)
    assert list(images.take([]).batches(model)) == []


def test_the_fingerprint_is_of_contents_classes_and_order(tmp_path):
    image_folder(tmp_path / "a", {"ant": 2, "bee": 1})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, same = load_images(tmp_path / "a"), load_images(tmp_path / "b")
    assert one.fingerprint == same.fingerprint
    picture(77).save(tmp_path / "b" / "bee" / "0.png")
    assert load_images(tmp_path / "b").fingerprint != one.fingerprint
    assert one.take([1, 0, 2]).fingerprint != one.fingerprint
    renamed = replace(one, folders=("ant", "bee", "bee"))
    assert renamed.fingerprint != one.fingerprint


def test_as_seen_is_what_the_model_gets_before_it_is_normalised():
    images, model = load_images("bundled", limit=2), load_model("bundled")
    seen = images.as_seen(1, model)
    assert seen.dtype == np.uint8
    normalised = next(images.batches(model))[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen / 255, normalised * 0.5 + 0.5, atol=1e-6)
