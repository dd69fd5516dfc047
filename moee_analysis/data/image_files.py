"""Which files of a folder of class folders are images, and why the others are not."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from moee_analysis.data.pictures import check_picture, suffixes
from moee_analysis.outside_text import printable
from moee_analysis.utils.progress import progress

NAMED = 5  # of skipped files, in a warning

Reasons = dict[Path, str]  # why files and folders are not read
FolderIds = set[tuple[int, int]]  # device and number


def list_images(folder: Path) -> tuple[list[Path], Reasons]:
    """List the files in the class folders of ``folder`` that may be images, and those skipped.

    Hidden files and folders are never read (JupyterLab's checkpoints, the second files of macOS).
    Folders that are links are followed, each folder once.
    """
    own = {_id_of(path) for place, _, _ in os.walk(folder) if (path := Path(place)).exists()}
    reasons = dict(_below(folder, folder, own))
    images = sorted(path for path, reason in reasons.items() if not reason)
    return images, {path: reason for path, reason in reasons.items() if reason}


def _below(
    folder: Path, top: Path, seen: FolderIds, *, linked: bool = False
) -> Iterator[tuple[Path, str]]:
    """Every file below ``folder``, and why it is not read; "" if it is.

    A link need not lead to a folder that was ``seen``; ``linked``: one has led here.
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


def _at(path: Path, top: Path, seen: FolderIds, *, linked: bool) -> Iterator[tuple[Path, str]]:
    if path.name.startswith("."):
        if path.suffix.lower() in suffixes():
            yield path, "hidden"
    elif not path.is_dir():
        reason = _reason(path, alone=path.parent == top)
        if reason or path.parent != top:
            yield path, reason
    elif (linked := linked or path.is_symlink()) and _id_of(path) in seen:
        yield path, "a link to a folder that is read in another place"
    else:
        seen.add(_id_of(path))
        yield from _below(path, top, seen, linked=linked)


def _id_of(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _reason(path: Path, *, alone: bool) -> str:
    """Why a file is no image, by its name alone; "" if it may be one.

    Files ``alone`` beside the class folders may be lists and notes: only images are named.
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


def find_unreadable(paths: Sequence[Path]) -> Reasons:
    """Which of ``paths`` cannot be read as pictures, and why."""
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=2) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # these are refused
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
