"""Checks that no image which something was made from is also one it is measured on."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.utils.progress import progress, tell

OTHERS = "choose others (--images DIR), or take these away from one of the two"
DIGITS = 16  # of each picture's hash: two of a million pictures are alike once in 37 million sets


def check_disjoint(made_from: ImageSet, seen: ImageSet, *, use: str) -> None:
    """Refuse images to evaluate that are among those ``made_from``, "used for calibration".

    Pictures are the same where their pixels are, whatever the name and the kind of their files.
    """
    check_unused(contents_of(made_from), seen, use=use)


def check_unused(contents: Iterable[str], seen: ImageSet, *, use: str) -> None:
    """Refuse images to evaluate whose content is among ``contents``; else as above."""
    own, contents = contents_of(seen), set(contents)
    if both := [place for place, content in enumerate(own) if content in contents]:
        found = f"{len({own[place] for place in both})} that are, such as {seen.name_of(both[0])}"
        raise MoeeError(f"images to evaluate that are not {use}", found, OTHERS)


def contents_of(images: ImageSet) -> list[str]:
    """Hash of the pixels of every image, in order."""

    def digest(index: int) -> str:
        picture = images.picture(index)
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:DIGITS]

    with ThreadPoolExecutor(max_workers=2) as pool:
        hashes = pool.map(digest, range(len(images)))
        return list(progress(hashes, label="comparing images", total=len(images), delay=1))


def without_repeats(images: ImageSet) -> ImageSet:
    """The images without those whose content came before; a line tells their number."""
    first = pd.Series(contents_of(images)).drop_duplicates().index
    repeated = len(images) - len(first)
    if not repeated:
        return images
    tell(f"{repeated} of the {len(images)} images of {images.name} are there twice: counted once")
    return images.take(first.to_numpy())
