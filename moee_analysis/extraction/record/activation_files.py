"""The files of a recording: a site's rows, in their full size from the start, filled bit by bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.output_gradients import taken_apart
from moee_analysis.utils.storage.files import bytes_text

File = tuple[str, str]  # a site's name, and what the file holds of it

FILES = {"inputs": ("inputs",), "hidden": ("hidden",), "gradients": ("directions", "norms")}
"""What a site's files hold, by kind of values; gradients have an axis of probes before the rows."""
DEFAULT = ("inputs", "hidden")


def contents_of(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the files of one site hold of its ``rows``, by kind of values."""
    contents = {kind: values.half() for kind, values in rows.items() if kind != "gradients"}
    if "gradients" in rows:
        directions, contents["norms"] = taken_apart(rows["gradients"])
        contents["directions"] = directions.half()
    return contents


def size_of(one: Mapping[File, np.ndarray], rows: Mapping[File, int]) -> int:
    """Bytes of so many ``rows`` of files of which ``one`` is a single row."""
    return sum(rows[file] * row.nbytes for file, row in one.items())


def create(folder: Path, one: Mapping[File, np.ndarray], rows: Mapping[File, int]) -> None:
    """Create all files of so many ``rows``, of the type and shape of ``one`` each.

    Raises
    ------
    MoeeError
        Not enough room for them. All of it is taken now, so that it does not run out later.
    """
    size, free = size_of(one, rows), shutil.disk_usage(folder).free
    if size > free:
        raise _no_room(folder, size, f"{bytes_text(free)} free")
    for file, row in one.items():
        axis = _row_axis(file)
        shape = (*row.shape[1 : 1 + axis], rows[file], *row.shape[1 + axis :])
        mapped = np.lib.format.open_memmap(folder / file_name(file), "w+", row.dtype, shape)
        _take_room(folder, file, mapped.offset + mapped.nbytes)


def _take_room(folder: Path, file: File, size: int) -> None:
    try:
        with (folder / file_name(file)).open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
    except OSError as error:  # another program was quicker, or a quota is used up
        raise _no_room(folder, size, str(error)) from None


def _no_room(folder: Path, size: int, found: str) -> MoeeError:
    return MoeeError(
        f"{bytes_text(size)} of free disk for the activations", f"{found} in '{folder.parent}'",
        "make room, set MOEE_STORE to another disk, or take fewer images or tokens",
    )  # fmt: skip


def in_memory(one: Mapping[File, np.ndarray], rows: Mapping[File, int]) -> dict[File, np.ndarray]:
    """What files of so many ``rows`` would hold, in memory; each is seen with its rows first."""
    return {file: np.empty((rows[file], *row.shape[1:]), row.dtype) for file, row in one.items()}


def as_on_disk(file: File, rows: np.ndarray) -> np.ndarray:
    """The ``rows`` of a file in the order of its axes on disk: gradients have probes first."""
    return np.moveaxis(rows, 0, _row_axis(file))


@dataclass(frozen=True)
class OnDisk(Mapping):
    """Files of ``folder`` that were created, seen with their rows first.

    Each is mapped anew when it is asked for, so that what was written leaves the memory of the
    process with the array.
    """

    folder: Path
    files: Collection[File]

    def __getitem__(self, file: File) -> np.ndarray:
        mapped = np.lib.format.open_memmap(self.folder / file_name(file), "r+")
        return np.moveaxis(mapped, _row_axis(file), 0)

    def __iter__(self) -> Iterator[File]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def write(file: np.ndarray, rows: torch.Tensor, *, start: int, name: str) -> None:
    """Write ``rows`` into a mapped file of the site ``name``, from row ``start`` on.

    Raises
    ------
    MoeeError
        Values that half precision does not hold.
    """
    if not torch.isfinite(rows).all():
        raise MoeeError(
            "activations within half precision (below 65504) and finite",
            f"larger or NaN values in {name}",
            "check the weights and the images' normalisation",
        )
    file[start : start + len(rows)] = rows.numpy()


def file_name(file: File) -> str:
    """Name of a file in its folder."""
    return f"{'.'.join(file)}.npy"


def _row_axis(file: File) -> int:
    """Where the rows are on disk: gradients have their probes first."""
    return int(file[1] in FILES["gradients"])
