"""Which files of a folder of class folders are images, and why the others are not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moee_analysis.data.pictures import check_picture, suffixes
from moee_analysis.outside_text import printable
from moee_analysis.utils.progress import progress

FolderId = tuple[int, int]  # device and number
NAMED = 5  # of skipped files, in a warning


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not read, by its path below the folder of classes, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """Image files below a folder, class by class, and what else was there."""

    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


def list_images(folder: Path) -> Listing:
    """List the files in the class folders of ``folder`` that may be images, in order.

    Hidden files and folders are never read (JupyterLab's checkpoints, the second files of macOS).
    Folders that are links are followed, each folder once.
    """
    paths: list[Path] = []
    skipped: list[Skipped] = []
    own: set[FolderId] = set()
    for place, _, _ in os.walk(folder):
        with suppress(OSError):  # it may be gone by now
            own.add(_id_of(Path(place)))
    for path, reason in _below(folder, folder, own):
        if reason:
            skipped.append(Skipped(readable_name(str(path.relative_to(folder))), reason))
        else:
            paths.append(path)
    return Listing(tuple(sorted(paths)), tuple(skipped))


def unreadable_among(paths: Sequence[Path], folder: Path) -> dict[int, Skipped]:
    """Which of ``paths`` cannot be read as pictures, by their place, and why."""
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=2) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # these are refused
        checked = pool.map(check_picture, paths)
        reasons = list(progress(checked, label="checking images", total=len(paths), delay=1))
    return {
        place: Skipped(readable_name(str(path.relative_to(folder))), reason)
        for place, (path, reason) in enumerate(zip(paths, reasons, strict=True))
        if reason
    }


def readable_name(name: str) -> str:
    r"""A file's name as it can be shown, also one not in UTF-8, as in old archives: ``caf\xe9``."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """What was skipped: how many for each reason, and the first of them by name."""
    of_reason: dict[str, list[str]] = {}
    for each in skipped:
        of_reason.setdefault(each.reason, []).append(each.path)
    return "; ".join(f"{len(paths)} {why}: {_some(paths)}" for why, paths in of_reason.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _below(
    folder: Path, top: Path, seen: set[FolderId], *, linked: bool = False
) -> Iterator[tuple[Path, str]]:
    """Every file below ``folder``, and why it is not read; "" if it is.

    ``seen`` are the folders that a link has no need to lead to; ``linked``: one has led here.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        yield folder, f"a folder that cannot be opened ({error.strerror})"
        return
    for path in paths:
        try:
            yield from _at(path, top, seen, linked=linked)
        except OSError as error:
            yield path, f"nothing that can be looked at ({error.strerror})"


def _at(path: Path, top: Path, seen: set[FolderId], *, linked: bool) -> Iterator[tuple[Path, str]]:
    """What :func:`_below` yields of one ``path``."""
    if path.name.startswith("."):
        if path.suffix.lower() in suffixes():
            yield path, "hidden"
    elif not path.is_dir():
        if reason := _reason(path, alone=path.parent == top):
            yield path, reason
        elif path.parent != top:
            yield path, ""
    elif (by_link := linked or path.is_symlink()) and _id_of(path) in seen:
        yield path, "a link to a folder that is read in another place"
    else:
        seen.add(_id_of(path))
        yield from _below(path, top, seen, linked=by_link)


def _id_of(folder: Path) -> FolderId:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _reason(path: Path, *, alone: bool) -> str:
    """Why a file is no image, by its name alone; "" if it may be one.

    Of files ``alone`` beside the class folders, which may be lists and notes, images are told.
    """
    suffix = path.suffix.lower()
    if alone:
        return "in no class folder" if suffix in suffixes() else ""
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "no regular file"
    if suffix in suffixes():
        return ""
    if suffix in (".heic", ".heif"):
        return "HEIC, which pip install pillow-heif lets Pillow read"
    return f"no image ({readable_name(suffix) or 'no suffix'})"
