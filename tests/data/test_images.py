"""Labelled images: which class a folder is, choosing among images, batches for a model."""

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


def named(*names):
    """A model whose classes are so called."""
    model = toy_vit()
    model.reset_classifier(len(names))
    model.pretrained_cfg["label_names"] = names
    return model


@pytest.mark.parametrize(("names", "model", "labels"), [
    (["n01443537", "n02917067", "n09246464"], IMAGENET, [1, 466, 972]),
    *[([name], IMAGENET, [1]) for name in ("goldfish", "Goldfish")],
    *[([name], IMAGENET, [466]) for name in ("bullet train", "bullet_train")],
    *[([name], BUNDLED, [CLASSES.index("fire_engine")])
      for name in ("fire_engine", "fire engine", "Fire-Engine")],
    (["пёс", "猫"], named("猫", "пёс"), [1, 0]),
])  # fmt: skip
def test_folders_are_wnids_or_readable_names_of_the_models_classes(tmp_path, names, model, labels):
    images = load_images(image_folder(tmp_path, dict.fromkeys(names, 1)))
    assert images.folders == tuple(names)
    assert images.labels(model).tolist() == labels
    assert images.labels(model).dtype == np.int64


@pytest.mark.parametrize("name", ["dragon", "crane"])  # unknown; the bird or the machine
def test_an_unknown_or_ambiguous_folder_is_refused_by_name(tmp_path, name):
    images = load_images(image_folder(tmp_path, {"n01443537": 1, name: 1}))
    with pytest.raises(MoeeError, match=f"1 unknown or ambiguous: {name}") as error:
        images.labels(IMAGENET)
    assert "n01440764" in error.value.expected


@pytest.fixture
def damaged(tmp_path):
    """Seven pictures, four of which cannot be read."""
    folder = image_folder(tmp_path / "photos", {"ant": 3, "bee": 3})
    (folder / "ant" / "0.png").write_bytes(b"")
    (folder / "ant" / "1.png").write_bytes(b"<html>404</html>")
    for path in (folder / "bee" / "2.png", folder / "bee" / "z.jpg"):
        picture(1, size=400).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
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
    picture(0).save(tmp_path / "flat.png")
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "missing", "no folder"), (tmp_path / ("x" * 300), "no folder"),
        (tmp_path / "empty", "<wnid or class name>/<image>"),
        (tmp_path, r"1 in no class folder: flat\.png.*<wnid or class name>"),
    ):  # fmt: skip
        with pytest.raises(MoeeError, match=words):
            load_images(folder)


def test_the_bundled_splits_differ_and_know_their_parts(tmp_path):
    one, other = (load_images(split=split, limit=40) for split in ("calibration", "evaluation"))
    assert np.bincount(one.labels(BUNDLED)).tolist() == [2] * 20
    assert one.fingerprint != other.fingerprint
    assert one.mask(0).shape == (64, 64)
    assert one.mask(0).max() < len(one.parts)
    for split in ("test", [], None):
        with pytest.raises(MoeeError, match="calibration, evaluation"):
            load_images(split=split)
    photographs = load_images(image_folder(tmp_path, {"ant": 1}))
    assert photographs.parts == ()
    with pytest.raises(MoeeError, match="only the bundled scenes"):
        photographs.mask(0)


def test_a_limit_is_even_over_the_classes_and_keeps_the_order():
    images = toy_images(60)
    few = images.limit(12, seed=1)
    assert np.unique(few.labels(toy_vit()), return_counts=True)[1].tolist() == [2] * 6
    assert list(few.rows) == sorted(few.rows)
    assert few.rows == images.limit(12, seed=1).rows
    assert few.rows != images.limit(12, seed=2).rows
    assert images.limit(None) is images.limit(1000) is images
    assert set(images.of_classes(["Bee", "fox"]).folders) == {"bee", "fox"}


def test_a_split_shares_nothing_and_loses_nothing():
    images = toy_images(30)
    one, other = images.split(0.4, seed=3)
    assert len(one) == 12
    assert sorted(one.rows + other.rows) == list(images.rows)
    assert np.bincount(one.labels(toy_vit())).tolist() == [2] * 6
    for share in (math.nan, math.inf, "3", -0.1, 1.5, None):
        with pytest.raises(MoeeError, match="share as a number at least 0 and at most 1"):
            images.split(share)


def test_the_fingerprint_is_of_contents_classes_and_order(tmp_path):
    image_folder(tmp_path / "a", {"ant": 2, "bee": 1})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, same = load_images(tmp_path / "a"), load_images(tmp_path / "b")
    assert one.fingerprint == same.fingerprint
    picture(77).save(tmp_path / "b" / "bee" / "0.png")
    others = [load_images(tmp_path / "b"), one.take([1, 0, 2]),
              replace(one, folders=("ant", "bee", "bee"))]  # fmt: skip
    assert one.fingerprint not in [other.fingerprint for other in others]


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
