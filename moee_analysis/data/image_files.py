"""Pictures from files: which files of class folders are any, and each as it is to be seen."""

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moee_analysis.outside_text import printable
from moee_analysis.utils.progress import progress

MANY = 40_000_000  # pixels that a JPEG is not decoded to in full
LONGEST = 64  # times the shorter side: of a longer strip the middle, which is all a crop sees
EIGHT_BITS, SIXTEEN_BITS = (31, 255), (4095, 65535)
DEEP = ("I", "F")  # modes of grey values of more than 8 bits
RANGES = {  # of grey values: the second is meant where the largest value is above the first
    "I;16": ((0, 255), SIXTEEN_BITS),
    "I": (EIGHT_BITS, SIXTEEN_BITS, (2**24, 2**31)),
    "F": ((0, 1), EIGHT_BITS, SIXTEEN_BITS),
}

NAMED = 5  # of skipped files, in a warning

Reasons = dict[Path, str]  # why files and folders are not read


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
    """Read a picture as it is to be seen, RGB in 8 bits; the first one of an animation.

    Numbers of 16 or 32 bits and floats are scaled from the range that they are written in, that of
    8, 16 or 31 bits, or from 0 to 1. Where they leave it open which one that is, the picture is
    refused: 12 bits in a file of 16 cannot be told from a dark picture.

    Raises UnreadableError: too many pixels, numbers in no such range. OSError: a damaged file.
    """
    suffixes()
    with Image.open(path) as image:
        pixels = image.width * image.height
        if pixels > Image.MAX_IMAGE_PIXELS:  # for which Pillow has no more than a warning
            raise UnreadableError(f"{pixels / 1e6:.0f} million pixels")
        if pixels > MANY:
            image.draft("RGB", (image.width // 2, image.height // 2))  # JPEG alone can
        image.load()  # which turns a TIFF upright by itself
        middle = _middle(image)
        # known and gone: it would be written again, which that of odd cameras does not bear
        middle.getexif()
        middle.info.pop("exif", None)
        return _as_rgb(ImageOps.exif_transpose(middle))


def check_picture(path: Path) -> str:
    """Say why a file cannot be read as a picture; "" if it can. Quick for JPEG."""
    suffixes()
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
            if image.mode.startswith(DEEP):
                _as_rgb(image)
    except UnreadableError as error:
        return str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS // 1_000_000} million pixels"
    except Exception as error:  # a damaged file can break a decoder in any way
        return f"damaged or no picture ({type(error).__name__})"
    return ""


def _middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of one that is a strip."""
    wide, high = (min(side, LONGEST * min(image.size)) for side in image.size)
    if (wide, high) == image.size:
        return image
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(DEEP):
        # a palette may have transparency that Pillow warns of
        image = image.convert("RGBA") if "transparency" in image.info else image
        return image.convert("RGB")
    values = np.array(image, np.float32)
    largest = float(values.max())
    if not np.isfinite(largest) or values.min() < 0:
        raise UnreadableError("values below 0 or not finite, in a range that is not known")
    if largest:  # else black; by the range of its kind, not of the picture
        ranges = RANGES["I;16" if image.mode.startswith("I;16") else image.mode]
        full = next((full for above, full in ranges if above < largest <= full), None)
        if full is None:
            raise UnreadableError(f"values up to {largest:.4g}, in a range that is not known")
        values *= 255 / full
    return Image.fromarray(np.round(values, out=values).astype(np.uint8)).convert("RGB")


def list_images(folder: Path) -> tuple[list[Path], Reasons]:
    """List the files in the class folders of ``folder`` that may be images, and those skipped.

    Hidden files and folders are never read (JupyterLab's checkpoints, the second files of macOS).
    Folders that are links are followed, each folder once.
    """
    reasons: Reasons = {}
    linked: set[Path] = set()
    seen = {Path(place).resolve() for place, _, _ in os.walk(folder)}

    def skip(error: OSError) -> None:
        reasons[Path(error.filename)] = f"a folder that cannot be opened ({error.strerror})"

    for place, folders, names in os.walk(folder, onerror=skip, followlinks=True):
        here = Path(place)
        if here != folder and (here.is_symlink() or here.parent in linked):
            linked.add(here)
            if (real := here.resolve()) in seen:
                reasons[here] = "a link to a folder that is read in another place"
                folders.clear()
                continue
            seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = {here / name: _reason(here / name, alone=here == folder) for name in names}
        reasons |= {path: reason for path, reason in found.items() if reason is not None}
    images = sorted(path for path, reason in reasons.items() if not reason)
    return images, {path: reasons[path] for path in sorted(reasons) if reasons[path]}


def _reason(path: Path, *, alone: bool) -> str | None:
    """Why a file is no image, by its name; "" if it may be one; None if nobody takes it for one.

    Files ``alone`` beside the class folders may be lists and notes: only images are named.
    """
    suffix, is_hidden = path.suffix.lower(), path.name.startswith(".")
    if suffix in suffixes() and (is_hidden or alone):
        return "hidden" if is_hidden else "in no class folder"
    if is_hidden or alone:
        return None
    try:
        if not path.is_file():
            return "no regular file" if path.exists() else "a link to nothing"
    except OSError as error:
        return f"nothing that can be looked at ({error.strerror})"
    if suffix in (".heic", ".heif") and suffix not in suffixes():
        return "HEIC, which pip install pillow-heif lets Pillow read"
    return "" if suffix in suffixes() else f"no image ({readable_name(suffix) or 'no suffix'})"


def find_unreadable(paths: Sequence[Path]) -> Reasons:
    """Which of ``paths`` cannot be read as pictures, and why."""
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=2) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        checked = pool.map(check_picture, paths)
        reasons = list(progress(checked, label="checking images", total=len(paths), delay=1))
    return {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}


def readable_name(name: str | Path) -> str:
    r"""A file's name as it can be shown, also one not in UTF-8, as in old archives: ``caf\xe9``."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def skipped_text(skipped: Mapping[str, str]) -> str:
    """Number of names for each reason, and the first of them."""
    names_of: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names_of.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(names)} {reason}: {', '.join(names[:NAMED])}{', ...' if names[NAMED:] else ''}"
        for reason, names in names_of.items()
    )
