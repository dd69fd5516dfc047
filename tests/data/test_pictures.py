"""Pictures are upright, RGB in 8 bits, whatever they were stored as, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from moee_analysis.data.images import load_images
from moee_analysis.data.pictures import (
    LONGEST,
    UnreadableError,
    check_picture,
    read_picture,
    suffixes,
)
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
    grey.save(tmp_path / "a.tif")
    assert read_picture(tmp_path / "a.tif").mode == "RGB"


@pytest.mark.parametrize("orientation", [*range(1, 9), 77])  # the last is broken
def test_a_photograph_is_turned_as_its_camera_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(1, size=48).resize((60, 40))
    for name in ("a.png", "a.tif", "a.webp"):
        stored.save(tmp_path / name, exif=exif, **({"lossless": True} if "webp" in name else {}))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGB")
    for name in ("a.png", "a.tif", "a.webp"):
        assert read_picture(tmp_path / name).tobytes() == upright.tobytes(), name


@pytest.mark.parametrize(
    ("name", "full", "kind"),
    [
        ("a.png", 65535, np.uint16), ("a.tif", 65535, np.uint16), ("a.tif", 65535, np.int32),
        ("a.tif", 2**31 - 1, np.int32), ("a.tif", 1, np.float32), ("a.tif", 255, np.float32),
        ("a.tif", 65535, np.float32), ("a.tif", 255, np.int32), ("a.png", 255, np.uint16),
    ],
)  # fmt: skip
def test_deep_pictures_show_what_they_show_in_8_bits(tmp_path, name, full, kind):
    seen = np.asarray(read_picture(saved(tmp_path / name, (full * RAMP).astype(kind))))
    assert seen.shape == (48, 64, 3)
    assert np.abs(seen.astype(int) - BYTES[:, :, None]).max() <= 1


def test_a_big_endian_picture_is_read_too(tmp_path):
    saved(tmp_path / "a.tif", (65535 * RAMP).astype(np.uint16))
    big = Image.frombytes("I;16B", (64, 48), (65535 * RAMP).astype(">u2").tobytes())
    big.save(tmp_path / "b.tif")
    one, other = (read_picture(tmp_path / name).tobytes() for name in ("a.tif", "b.tif"))
    assert one == other


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (-RAMP.astype(np.float32), "below 0"),
        (np.where(RAMP == 1, np.nan, RAMP).astype(np.float32), "not finite"),
        (np.where(RAMP == 1, np.inf, RAMP).astype(np.float32), "not finite"),
        ((1e6 * RAMP).astype(np.float32), "1e\\+06"),
        ((70000 * RAMP).astype(np.int32), "7e\\+04"),
        ((4095 * RAMP).astype(np.uint16), "4095"),
        ((300 * RAMP).astype(np.uint16), "300"),
        ((1.02 * RAMP).astype(np.float32), "1.02"),
        ((1000 * RAMP).astype(np.float32), "1000"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused_by_name(tmp_path, values, why):
    path = saved(tmp_path / "a.tif", values)
    with pytest.raises(UnreadableError, match=why):
        read_picture(path)
    assert "in a range that is not known" in check_picture(path)


def test_a_black_picture_is_black(tmp_path):
    for name, kind in (("a.png", np.uint16), ("a.tif", np.int32), ("b.tif", np.float32)):
        black = read_picture(saved(tmp_path / name, np.zeros((8, 8), kind)))
        assert black.getextrema() == ((0, 0),) * 3


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = picture(1).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert read_picture(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "gif", "avif", "webp", "tga", "JPEG", "jp2"])
def test_whatever_pillow_reads_is_read(tmp_path, suffix):
    folder = image_folder(tmp_path / "photos", {"ant": 1})
    kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix)
    picture(2).save(folder / "ant" / f"b.{suffix}", format=kind)
    assert len(load_images(folder)) == 2
    assert {".heic", ".pdf"} & suffixes() <= {".heic"}


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


def test_the_middle_of_a_turned_strip_is_that_of_the_upright_one(tmp_path):
    values = np.arange(3 * 600, dtype=np.uint16).reshape(3, 600).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    whole = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    top = (600 - 3 * LONGEST) // 2
    middle = whole.crop((0, top, 3, top + 3 * LONGEST)).convert("RGB")
    assert read_picture(tmp_path / "a.png").tobytes() == middle.tobytes()


@pytest.mark.parametrize("megapixels", [(95, "95 million"), (190, "178 million")])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, megapixels):
    count, told = megapixels
    folder = image_folder(tmp_path / "photos", {"ant": 1})
    Image.new("1", (10000, 100 * count)).save(folder / "ant" / "bomb.png")
    with pytest.warns(UserWarning, match=told):
        images = load_images(folder)
    assert images.skipped == ("ant/bomb.png",)
    with pytest.raises(MoeeError, match=told):
        load_images(folder, strict=True)


def test_a_huge_photograph_is_decoded_smaller(tmp_path):
    Image.new("L", (8000, 6000), 90).save(tmp_path / "a.jpg")
    seen = read_picture(tmp_path / "a.jpg")
    assert seen.size == (4000, 3000)
    assert seen.getpixel((9, 9)) == (90, 90, 90)
