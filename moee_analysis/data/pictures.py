"""One picture from a file: upright, red green and blue in 8 bits, whatever it was stored as."""

from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

PIXELS = 89_000_000  # Pillow's own limit against decompression bombs
MANY = 40_000_000  # pixels that a JPEG is not decoded to in full
LONGEST = 64  # times the shorter side: of a longer strip the middle, which is all a crop sees
TURNS = {  # by the orientation that a camera stored (EXIF)
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
EIGHT_BITS, SIXTEEN_BITS = (31, 255), (4095, 65535)
RANGES = {  # of grey values: the second is meant where the largest value is above the first
    "I;16": ((0, 255), SIXTEEN_BITS),
    "I": (EIGHT_BITS, SIXTEEN_BITS, (2**24, 2**31)),
    "F": ((0, 1), EIGHT_BITS, SIXTEEN_BITS),
}


class UnreadableError(Exception):
    """A file that cannot be shown as a picture; the message says why."""


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads here, in lower case."""
    with suppress(ImportError):  # where it is installed, Pillow learns HEIC from it
        import pillow_heif

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions()
    return frozenset(end for end, kind in known.items() if kind in Image.OPEN) | {".jfif"}


def read_picture(path: Path) -> Image.Image:
    """Read a picture as it is to be seen, RGB in 8 bits.

    The orientation that a camera stored (EXIF) is applied. Numbers of 16 or 32 bits and floats are
    scaled from the range that they are written in, that of 8, 16 or 31 bits, or from 0 to 1. Where
    the numbers leave it open which one that is, the picture is refused: 12 bits in a file of 16
    cannot be told from a dark picture. Of an animation the first picture counts.

    Raises
    ------
    UnreadableError
        Too many pixels; numbers in no such range.
    OSError
        A damaged or foreign file.
    """
    with _opened(path) as image:
        if image.width * image.height > MANY:
            image.draft("RGB", (image.width // 2, image.height // 2))  # JPEG alone can
        image.load()  # which turns a TIFF upright by itself
        # ImageOps.exif_transpose writes the EXIF again, which odd cameras' does not bear
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        middle = _middle(image)
        return _as_rgb(middle if turn is None else middle.transpose(turn))


def check_picture(path: Path) -> str:
    """Say why a file cannot be read as a picture; "" if it can. Quick for JPEG."""
    try:
        with _opened(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
            if _is_deep(image):
                _as_rgb(image)
    except UnreadableError as error:
        return str(error)
    except Image.DecompressionBombError:
        return f"more than {2 * PIXELS // 1_000_000} million pixels"
    except Exception as error:  # a damaged file can break a decoder in any way
        return f"damaged or no picture ({type(error).__name__})"
    return ""


def _opened(path: Path) -> Image.Image:
    suffixes()
    image = Image.open(path)
    pixels = image.width * image.height
    if pixels > PIXELS:
        image.close()
        raise UnreadableError(f"{pixels / 1e6:.0f} million pixels, more than {PIXELS // 1_000_000}")
    return image


def _middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of one that is a strip."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) <= LONGEST * short:
        return image
    wide, high = min(width, LONGEST * short), min(height, LONGEST * short)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _as_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return Image.fromarray(_in_bytes(image)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _in_bytes(image: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits as bytes, by the range of their kind, not of the picture."""
    values = np.array(image, np.float32)
    largest = float(values.max())
    if not np.isfinite(largest) or values.min() < 0:
        raise UnreadableError("values below 0 or not finite, in a range that is not known")
    if largest:
        values *= 255 / _range_of(largest, image.mode)
    return np.round(values, out=values).astype(np.uint8)


def _range_of(largest: float, mode: str) -> float:
    """The largest value that a picture of such a mode is meant to have, as its own largest says."""
    for above, full in RANGES["I;16" if mode.startswith("I;16") else mode]:
        if above < largest <= full:
            return full
    raise UnreadableError(f"values up to {largest:.4g}, in a range that is not known")
