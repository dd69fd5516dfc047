"""Temporary folders: each becomes the one it is named for, or vanishes, also after a kill."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import ended_in_order
from moee_analysis.utils.storage.files import flush
from moee_analysis.utils.storage.locks import RANDOM, held, is_held, temporary, temporary_prefix
from moee_analysis.utils.storage.refusals import writing

OLD = "-old"
OTHER_TEMPORARY = "make room there, or set TMPDIR to a folder on another disk"

make_folder = partial(Path.mkdir, mode=0o700)


@contextmanager
def new_folder(final: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary folder that becomes ``final`` on success and vanishes on failure.

    An older ``final`` stays until the new one is flushed to the disk, and for good without
    ``replace``. A place that is full or closed raises a ``MoeeError``.
    """
    final = Path(final).resolve()
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _restore(final)
        with temporary(temporary_prefix(final), make_folder) as new, writing(final, new=new):
            yield new
            complete(new)
            if replace:
                _replace(new, final)
            else:
                new.rename(final)
            flush(final.parent)


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Give a folder for intermediate results, gone when this is closed, as by SIGTERM."""
    try:
        prefix = Path(tempfile.gettempdir()) / f"moee-{kind}-"
    except FileNotFoundError as error:
        raise MoeeError("a folder for temporary files", str(error), OTHER_TEMPORARY) from None
    with ended_in_order(), ExitStack() as stack:
        with writing(prefix.parent, hint=OTHER_TEMPORARY):
            folder = stack.enter_context(temporary(prefix, make_folder))
        with writing(folder, hint=OTHER_TEMPORARY):
            yield folder


def held_folder(folder: Path) -> AbstractContextManager[None]:
    """Make a folder, if it is not there, and hold it alone; wait for another process to end."""
    return held(folder, _make_with_parents)


def _make_with_parents(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def complete(folder: Path) -> None:
    """Bring a folder to the disk, with all that is in it, and let others read it."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            path.chmod(0o755 if path.is_dir() else 0o644)  # some libraries let its owner alone
            flush(path)


def _replace(new: Path, final: Path) -> None:
    """Put ``new`` in the place of ``final``; the old one is removed only afterwards."""
    old = Path(f"{new}{OLD}")
    with suppress(FileNotFoundError):
        final.rename(old)
    try:
        new.rename(final)
    except OSError:
        with suppress(FileNotFoundError):
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(final: Path) -> None:
    """Finish an exchange of folders that a kill has cut short: the old one is there, or gone."""
    pattern = re.escape(temporary_prefix(final).name) + RANDOM + OLD
    for old in [path for path in final.parent.iterdir() if re.fullmatch(pattern, path.name)]:
        if is_held(Path(str(old).removesuffix(OLD))):
            continue
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
