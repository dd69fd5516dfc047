"""The values of options on the command line: a text in, a value out, or one line of why not.

None of the heavy libraries is needed for that: a wrong call is refused at once.
"""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.report.summary.gates import SUMMARY
from moee_analysis.utils import checks
from moee_analysis.utils.storage.files import check_file
from moee_analysis.utils.storage.refusals import check_place

BUNDLED = "bundled"
DEVICE = r"(cpu|cuda|hpu|mps|mtia|xpu)(:\d{1,3})?"
LONGEST = 200  # letters of the name of a model or a system
LONGEST_FILE = 240  # bytes of the name of a file: temporary names are longer, 255 is the most
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
Reader = Callable[[str], Any]
UNSET = "name one; an empty one may be a variable that is not set"


def told(read: Reader) -> Reader:
    """Reader that lets argparse tell what ``read`` refuses."""

    @wraps(read)
    def reader(text: str) -> Any:
        try:
            return read(text)
        except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
            refused = MoeeError("a path that can be used", str(error), "choose another")
        except MoeeError as error:
            refused = error
        raise ArgumentTypeError(str(refused))

    return reader


def passing(kind: Reader, check: Callable[..., None], name: str = "", **bounds: Any) -> Reader:
    """Reader of a value of this ``kind`` that passes one of ``checks``."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        check(name, value, **bounds)
        return value

    return read


whole = partial(passing, int, checks.whole_number)  # from ``least`` (1) to ``most``
real = partial(passing, float, checks.real_number)  # within its bounds
share = passing(float, checks.share)  # above 0 and up to 1
part = passing(float, checks.share, whole=False)  # between 0 and 1
seed = whole(least=0, most=checks.LAST_SEED)


def name(text: str) -> str:
    """A name of something that only heavy libraries know."""
    if not text.strip() or not text.isprintable() or len(text) > LONGEST:
        found = f"{len(text)} letters" if len(text) > LONGEST else repr(text)
        raise MoeeError(f"a name of up to {LONGEST} letters that can be printed", found, UNSET)
    return text


def device(text: str) -> str:
    """A device as PyTorch names it; whether it is here is not known yet."""
    if not re.fullmatch(DEVICE, text):
        hint = "use cpu, or cuda where there is one"
        raise MoeeError("a device such as cpu, cuda, cuda:1, mps or xpu", repr(text), hint)
    return text


def size(text: str) -> float:
    """A size in bytes, or with a unit as in ``20GB``."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([kMGT]?B)?", text)
    if not found:
        raise MoeeError("a size such as 20GB, 500MB or 0", repr(text), "correct it")
    return float(found[1]) * UNITS[found[2] or "B"]


def existing_file(text: str) -> str:
    """A file that can be read."""
    expected, path = "a file that can be read", _path(text)
    check_file(path, expected=expected)
    if not os.access(path, os.R_OK):
        raise MoeeError(expected, f"one that cannot at '{path}'", "change its permissions")
    return text


def images(text: str) -> str:
    """``bundled``, or a folder."""
    if text != BUNDLED:
        _check_folder(_path(text), f"'{BUNDLED}' or a folder of class folders")
    return text


def earlier_report(text: str) -> Path:
    """The folder of a report, or its summary."""
    path = _path(text)
    check_file(path / SUMMARY if path.is_dir() else path, expected=f"an earlier report's {SUMMARY}")
    return path


def run_folder(text: str) -> Path:
    """The folder of a run that is there."""
    path = _path(text)
    check_file(path / "run.json", expected="the folder of a run, as extract makes it")
    return path


def new_folder(text: str) -> Path:
    """A place for a folder; one that is there already will do."""
    path = _path(text)
    longest = max(len(os.fsencode(part)) for part in path.absolute().parts)
    if longest > LONGEST_FILE:  # of a folder that has to be made too
        raise MoeeError(f"a name of up to {LONGEST_FILE} bytes", f"one of {longest}", "shorten it")
    if path.exists():
        _check_folder(path, "a place for a folder")
    check_place(path)
    return path


def store(text: str) -> Path:
    """The folder of a store; one that is there may be one that can only be read."""
    path = _path(text)
    return path if path.is_dir() else new_folder(text)


def new_file(text: str) -> Path:
    """A place for a file in a folder that is there; an older file will be replaced."""
    path, expected = _path(text), "a place for a file"
    _check_folder(path.parent, f"{expected} '{path}'")
    if path.exists():
        check_file(path, expected=expected, hint="choose another place")
    check_place(path)
    return path


def _path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise MoeeError("a path", repr(text), UNSET)
    return Path(text)


def _check_folder(path: Path, expected: str) -> None:
    if not path.is_dir():
        raise MoeeError(expected, f"no folder '{path}'", "check the path")
