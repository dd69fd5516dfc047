"""The files of a recording: all rows of a site, in their full size from the start, filled in turn.

Checksums tell how many images are whole on the disk, so that a killed recording goes on.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.checksums import read_signed, write_signed
from moee_analysis.utils.storage.refusals import bytes_text

File = tuple[str, str]  # a site's name, and what the file holds of it
Blocks = Mapping[File, np.ndarray]  # the rows of one image in every file, all zeros

CONTENTS = {"inputs": ("inputs",), "hidden": ("hidden",), "gradients": ("directions", "norms")}
"""What a site's files hold, by kind of values."""
PROGRESS = "progress.json"


def contents_of(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the files of one site hold of its ``rows``, by kind of values."""
    contents = {kind: values.half() for kind, values in rows.items() if kind != "gradients"}
    if "gradients" in rows:
        directions, contents["norms"] = split_norms(rows["gradients"])
        contents["directions"] = directions.half()
    return contents


def split_norms(gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split gradients (..., dim) into unit vectors (..., dim) and norms (...,), both float32.

    The unit vectors are safe in half precision whatever the gradients' size; zeros stay zeros.
    """
    exact = gradients.double()  # where no square of a float32 over- or underflows
    norms = torch.linalg.vector_norm(exact, dim=-1)
    directions = exact / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]
    return directions.float(), norms.float()


def path_of(folder: Path, file: File) -> Path:
    """Where a file of a recording is."""
    return folder / f"{'.'.join(file)}.npy"


def map_file(folder: Path, file: File) -> np.ndarray:
    """Map a file that was created; what is written leaves the process's memory with the array."""
    return np.lib.format.open_memmap(path_of(folder, file), "r+")


def size_of(blocks: Blocks, images: int) -> int:
    """Bytes of the files of so many images."""
    return images * sum(block.nbytes for block in blocks.values())


def create(folder: Path, blocks: Blocks, images: int) -> None:
    """Create the files of so many images; all room is taken now, so that none lacks later."""
    size, free = size_of(blocks, images), shutil.disk_usage(folder).free
    if size > free:
        raise _no_room(folder, size, f"{bytes_text(free)} free")
    for file, block in blocks.items():
        path, shape = path_of(folder, file), (images * len(block), *block.shape[1:])
        mapped = np.lib.format.open_memmap(path, "w+", block.dtype, shape)
        try:
            with path.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, mapped.offset + mapped.nbytes)
        except OSError as error:  # another program was quicker, or a quota is used up
            raise _no_room(folder, size, str(error)) from None


def _no_room(folder: Path, size: int, found: str) -> MoeeError:
    return MoeeError(
        f"{bytes_text(size)} of free disk for the activations", f"{found} in '{folder.parent}'",
        "make room, set MOEE_STORE to another disk, or take fewer images or tokens",
    )  # fmt: skip


def write_rows(target: np.ndarray, rows: torch.Tensor, *, start: int, name: str) -> None:
    """Write ``rows`` of the site ``name`` into a file's array, from row ``start`` on."""
    if not torch.isfinite(rows).all():
        raise MoeeError(
            "activations within half precision (below 65504) and finite",
            f"larger or NaN values in {name}", "check the weights and the images' normalisation",
        )  # fmt: skip
    target[start : start + len(rows)] = rows.numpy()


@dataclass
class SavedImages:
    """How many images of a recording are whole in its ``folder``; ``hashes`` are of their rows."""

    folder: Path
    blocks: Blocks
    count: int = 0
    hashes: dict[File, Any] = field(default_factory=dict)

    def save(self, count: int) -> None:
        """Say that there are so many images now; their rows are brought to the disk."""
        self._hash(count)
        for file in self.blocks:
            map_file(self.folder, file).flush()
        write_signed(self.folder / PROGRESS, {"images": count, "hashes": self._digests})

    def resume(self) -> bool:
        """Find the images that were saved before; whether there are any, and they are whole."""
        path = self.folder / PROGRESS
        if not path.exists():
            return False
        try:
            saved = read_signed(path)
            self._hash(saved["images"])
            whole = self._digests == saved["hashes"]
            damage = "" if whole else "other values than were saved"
        except MoeeError as error:
            damage = error.found
        except Exception as error:  # a damaged file can break the reader in any way
            damage = str(error)
        if damage:
            tell(f"the recording in '{self.folder}' is damaged ({damage}): it begins again")
            self.count, self.hashes = 0, {}
        return not damage

    @property
    def _digests(self) -> dict[str, str]:
        return {".".join(file): found.hexdigest() for file, found in sorted(self.hashes.items())}

    def _hash(self, count: int) -> None:
        """Add the rows up to those of so many images; before the first ones, the file's header."""
        for file, block in self.blocks.items():
            mapped, path = map_file(self.folder, file), path_of(self.folder, file)
            if file not in self.hashes:
                if path.stat().st_size != mapped.offset + mapped.nbytes:
                    raise ValueError(f"{path.name} has another size")
                with path.open("rb") as opened:
                    self.hashes[file] = hashlib.sha256(opened.read(mapped.offset))
            rows = slice(self.count * len(block), count * len(block))
            self.hashes[file].update(np.ascontiguousarray(mapped[rows]))
        self.count = count
