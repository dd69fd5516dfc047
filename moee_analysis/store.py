"""The content-keyed store: folders that are complete or absent, found again by what made them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


FORMAT = 5
"""Part of every key: raise it whenever a step of the extraction changes its results."""

ELSEWHERE = "make room, or name another folder for the store: --store DIR, or MOEE_STORE"


def content_key(**facts: Any) -> str:
    """Short key of everything that decides a result; ``facts`` must be plain JSON values."""
    text = json.dumps({"store_format": FORMAT, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def kept(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``root/name``, letting ``build(folder)`` fill it first if it is absent.

    The folder appears only when ``build`` has finished; a failure leaves nothing behind.
    """
    final = root / name
    if not final.is_dir():
        with new_folder(final, replace=False, hint=ELSEWHERE) as partial:
            build(partial)
    return final


def check_writable(root: Path) -> None:
    """Refuse a store that cannot be written to, before anything is computed for it.

    Raises
    ------
    MoeeError
        It cannot be made, or not be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise MoeeError(
            f"a store that can be written to at '{root}'", str(error), ELSEWHERE
        ) from None


def check_place(path: Path) -> None:
    """Refuse a file or folder that cannot be made at ``path``, before it is computed.

    Raises
    ------
    MoeeError
        A file in the way, or a folder that cannot be written to.
    """
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        found = f"'{above}', " + ("not to be written to" if above.is_dir() else "a file")
        raise MoeeError(f"a place to write '{path}'", found, "choose another place")


def resumed(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder ``root/name``, letting ``build(folder)`` fill or finish it if it is absent.

    What a killed process leaves stays hidden, and is there when ``build`` is called again, which
    must tell for itself what of it is whole. One process builds at a time, others wait.

    Raises
    ------
    MoeeError
        A folder that cannot be written to; what ``build`` refuses, and then nothing of it is left.
    """
    final, unfinished = root / name, unfinished_folder(root / name)
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f".{name}.lock"):
            if not final.is_dir():
                unfinished.mkdir(exist_ok=True)
                _finish(unfinished, final, build)
    except OSError as error:
        raise MoeeError(f"a place to write '{final}'", str(error), ELSEWHERE) from None
    return final


def unfinished_folder(final: Path) -> Path:
    """Where :func:`resumed` fills the folder ``final``, until it is complete."""
    return final.with_name(f".{final.name}-unfinished")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same ``path``."""
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # whoever waits for this one tries again with a new one


def _finish(unfinished: Path, final: Path, build: Callable[[Path], None]) -> None:
    for cut_off in unfinished.glob(".*"):  # what `write_json` wrote when it was killed
        cut_off.unlink()
    try:
        build(unfinished)
    except MoeeError:  # the next attempt would fail as well
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(final)


@contextmanager
def new_folder(
    final: Path, *, replace: bool = True, hint: str = "choose a folder that can be written to"
) -> Iterator[Path]:
    """Give a temporary folder that becomes ``final`` on success and vanishes on failure.

    An older ``final`` stays untouched until the new one is complete, and for good without
    ``replace``. ``hint`` says what to do where no folder can be made.
    """
    final = Path(final).resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise MoeeError(f"a place to write '{final}'", str(error), hint) from None
    try:
        yield partial
        partial.chmod(0o755)
        if replace:
            _replace_folder(partial, final)
        else:
            _publish_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, atomically.

    Raises
    ------
    MoeeError
        The folder is missing or cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise MoeeError(
            f"a place to write '{path}'", str(error), "choose a folder that can be written to"
        ) from None
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _replace_folder(new: Path, final: Path) -> None:
    """Put ``new`` in the place of ``final``; the old one is removed only afterwards."""
    old = Path(f"{new}-old")
    with suppress(FileNotFoundError):
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        with suppress(FileNotFoundError):
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _publish_folder(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``, unless another process was first with the same content."""
    try:
        new.rename(final)
    except OSError:
        if not final.is_dir():
            raise
