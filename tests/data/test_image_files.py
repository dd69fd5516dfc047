"""Files are pictures, upright, RGB in 8 bits, whatever they were stored as, or named with why."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from moee_analysis.data.image_files import LONGEST, UnreadableError, check_picture, read_picture
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from tests.helpers.images import image_folder, picture
from tests.helpers.models import toy_vit

RAMP = np.linspace(0, 1, 64 * 48, dtype=np.float64).reshape(48, 64)
BYTES = np.round(255 * RAMP)


def saved(path, values):
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_picture_becomes_rgb(tmp_path, mode):
    grey = picture(0, mode="L")
    grey = grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)
    transparent = {"transparency": bytes(range(256))} if mode == "P" else {}
    grey.save(tmp_path / "a.png" if mode == "P" else tmp_path / "a.tif", **transparent)
    (path,) = tmp_path.iterdir()
    assert read_picture(path).mode == "RGB"


@pytest.mark.parametrize("orientation", [*range(1, 9), 77])  # the last is broken
@pytest.mark.parametrize("height", [40, 3])  # of a strip the middle of what is upright
def test_a_photograph_is_turned_as_its_camera_says(tmp_path, orientation, height):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(1, size=200).crop((0, 0, 200, height))
    for name in ("a.png", "a.tif", "a.webp"):
        stored.save(tmp_path / name, exif=exif, **({"lossless": True} if "webp" in name else {}))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGB")
    width, tall = (min(side, LONGEST * min(upright.size)) for side in upright.size)
    left, top = (upright.width - width) // 2, (upright.height - tall) // 2
    upright = upright.crop((left, top, left + width, top + tall))
    for path in tmp_path.iterdir():
        assert read_picture(path).tobytes() == upright.tobytes(), path


@pytest.mark.parametrize(("name", "full", "kind"), [
    ("a.png", 65535, np.uint16), ("a.tif", 65535, np.uint16), ("a.tif", 65535, np.int32),
    ("a.tif", 2**31 - 1, np.int32), ("a.tif", 1, np.float32), ("a.tif", 255, np.float32),
    ("a.tif", 65535, np.float32), ("a.tif", 255, np.int32), ("a.png", 255, np.uint16),
    ("a.png", 0, np.uint16), ("a.tif", 0, np.int32), ("a.tif", 0, np.float32),
    ("a.tif", 65535, ">u2"),
])  # fmt: skip
def test_deep_pictures_show_what_they_show_in_8_bits(tmp_path, name, full, kind):
    values = (full * RAMP).astype(kind)
    if kind == ">u2":
        Image.frombytes("I;16B", (64, 48), values.tobytes()).save(tmp_path / name)
    else:
        saved(tmp_path / name, values)
    seen = np.asarray(read_picture(tmp_path / name))
    assert seen.shape == (48, 64, 3)
    assert np.abs(seen.astype(int) - BYTES[:, :, None] * (full > 0)).max() <= 1


@pytest.mark.parametrize(("values", "kind", "why"), [
    (-RAMP, "f4", "below 0"), (np.where(RAMP == 1, np.nan, RAMP), "f4", "not finite"),
    (np.where(RAMP == 1, np.inf, RAMP), "f4", "not finite"), (1e6 * RAMP, "f4", r"1e\+06"),
    (70000 * RAMP, "i4", r"7e\+04"), (4095 * RAMP, "u2", "4095"), (300 * RAMP, "u2", "300"),
    (1.02 * RAMP, "f4", "1.02"), (1000 * RAMP, "f4", "1000"),
])  # fmt: skip
def test_numbers_of_an_unknown_range_are_refused_by_name(tmp_path, values, kind, why):
    path = saved(tmp_path / "a.tif", values.astype(kind))
    with pytest.raises(UnreadableError, match=why):
        read_picture(path)
    assert "in a range that is not known" in check_picture(path)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "gif", "avif", "webp", "tga", "JPEG", "jp2"])
def test_whatever_pillow_reads_is_read(tmp_path, suffix):
    folder = image_folder(tmp_path / "photos", {"ant": 1})
    kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix)
    picture(2).save(folder / "ant" / f"b.{suffix}", format=kind)
    (folder / "ant" / "c.pdf").write_bytes(b"%PDF-1.4")
    with pytest.warns(UserWarning, match=r"skipped 1 file.*no image \(\.pdf\): ant/c\.pdf"):
        assert len(load_images(folder)) == 2


@pytest.mark.parametrize("size", [(12000, 1), (1, 12000), (3, 9000)])
def test_of_a_strip_the_middle_is_seen(tmp_path, size):
    folder = image_folder(tmp_path / "photos", {"ant": 1})
    Image.new("RGB", size, (200, 10, 90)).save(folder / "ant" / "strip.png")
    images = load_images(folder)
    strip = images.picture(1)
    assert max(strip.size) == LONGEST * min(size)
    assert min(strip.size) == min(size)
    (batch,) = images.batches(toy_vit())
    assert batch.shape == (2, 3, 32, 32)
    torch.testing.assert_close(batch[1].amax((1, 2)), batch[1].amin((1, 2)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("megapixels", "words"), [(95, "89 million"), (190, "89 million")])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, megapixels, words):
    folder = image_folder(tmp_path / "photos", {"ant": 1})
    Image.new("1", (10000, 100 * megapixels)).save(folder / "ant" / "bomb.png")
    with pytest.warns(UserWarning, match=words):
        images = load_images(folder)
    assert images.skipped == ("ant/bomb.png",)
    with pytest.raises((UnreadableError, Image.DecompressionBombError), match="pixels"):
        read_picture(folder / "ant" / "bomb.png")
    with pytest.raises(MoeeError, match=words):
        load_images(folder, strict=True)


def test_a_huge_photograph_is_decoded_smaller(tmp_path):
    Image.new("L", (8000, 6000), 90).save(tmp_path / "a.jpg")
    seen = read_picture(tmp_path / "a.jpg")
    assert seen.size == (4000, 3000)
    assert seen.getpixel((9, 9)) == (90, 90, 90)


# Folders


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"ant": 2, "bee": 1})


def test_hidden_folders_are_never_read_hidden_pictures_named_and_odd_names_shown(photos):
    for folder in (photos / "ant" / ".ipynb_checkpoints", photos / ".ipynb_checkpoints"):
        folder.mkdir()
        picture(5).save(folder / "0-checkpoint.png")
    (photos / "bee").rename(os.fsdecode(bytes(photos) + b"/caf\xe9"))  # no UTF-8
    images = load_images(photos)
    assert [path.name for path in images.source.paths] == ["0.png", "1.png", "0.png"]
    assert images.classes == ("ant", "caf\\xe9")
    assert images.fingerprint
    assert images.picture(2).size
    assert not images.skipped
    shutil.copy(photos / "ant" / "0.png", photos / "ant" / "._0.png")
    (photos / "ant" / ".DS_Store").write_bytes(b"whatever")
    with pytest.warns(UserWarning, match=r"1 hidden: ant/\._0\.png"):
        assert len(load_images(photos)) == 3


@pytest.mark.parametrize(("links", "count", "skipped"), [
    ({"bee/session": "../../elsewhere/eel", "cat": "../elsewhere/eel"}, 5, "cat"),
    ({"ant/loop": ".."}, 3, "ant/loop"), ({"ant/loop": "../.."}, 5, "ant/loop"),
    ({"ant/loop": "."}, 3, "ant/loop"), ({"a_link": "bee"}, 3, "a_link"),
])  # fmt: skip
def test_a_linked_folder_is_followed_once(photos, tmp_path, links, count, skipped):
    image_folder(tmp_path / "elsewhere", {"eel": 2})
    for name, goal in links.items():
        (photos / name).symlink_to(goal)
    place = f"a link to a folder that is read in another place: {skipped}"
    with pytest.warns(UserWarning, match=place):
        images = load_images(photos)
    assert len(images) == count
    assert images.classes == ("ant", "bee")


def test_what_is_no_image_is_named_with_its_reason_and_count(photos):
    for name in ("ant/notes.txt", "ant/more.txt", "bee/raw.dng", "bee/phone.heic", "labels.csv"):
        (photos / name).write_text("x")
    (photos / "bee" / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "ant" / "deep").mkdir()
    picture(1).save(photos / "ant" / "deep" / "a.JPEG")
    picture(2).save(photos / "loose.png")
    os.mkfifo(photos / "ant" / "x.jpg")  # is not waited for
    with pytest.warns(UserWarning, match="skipped 7 files") as caught:
        images = load_images(photos)
    assert images.folders == ("ant", "ant", "ant", "bee")
    assert caught[0].filename == __file__
    assert images.skipped_text in str(caught[0].message)
    for words in (
        "2 no image (.txt): ant/more.txt, ant/notes.txt", "1 no image (.dng): bee/raw.dng",
        "1 a link to nothing: bee/gone.jpg", "pillow-heif", "1 no regular file: ant/x.jpg",
        "1 in no class folder: loose.png",
    ):  # fmt: skip
        assert words in images.skipped_text
    assert "labels.csv" not in images.skipped_text
    assert len(images.skipped) == 7


@pytest.mark.parametrize(("method", "name", "found"), [
    ((os, "scandir"), "bee", r"cannot be opened \(Permission denied\): bee"),
    ((Path, "is_file"), "cwd", r"looked at \(Permission denied\): bee/cwd"),
])  # fmt: skip
def test_what_may_not_be_looked_at_is_named(photos, monkeypatch, method, name, found):
    allowed = getattr(*method)

    def forbidden(path):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", path)
        return allowed(path)

    (photos / "bee" / "cwd").touch()
    monkeypatch.setattr(*method, forbidden)
    with pytest.warns(UserWarning, match=found):
        assert len(load_images(photos)) == (2 if name == "bee" else 3)
