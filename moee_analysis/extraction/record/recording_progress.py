"""How far a recording is: so many images are whole on the disk, which checksums of them tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.activation_files import File, file_name
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.checksums import read_signed, write_signed

FILE = "progress.json"


@dataclass
class Whole:
    """The first ``images`` of a recording in its ``files``, of which each has so many ``rows``.

    ``rows`` are those of one image; ``hashes`` are of the rows of all images, file by file.
    """

    folder: Path
    files: Mapping[File, np.ndarray]
    rows: Mapping[File, int]
    images: int = 0
    hashes: dict[File, Any] = field(default_factory=dict)

    def add(self, images: int) -> None:
        """Save that there are so many images now; their rows are brought to the disk."""
        self._hash(images)
        for mapped in self.files.values():
            mapped.flush()
        write_signed(self.folder / FILE, {"images": images, "hashes": self._told})

    def go_on(self) -> bool:
        """Find the images that were saved before; whether there are any, and they are whole.

        Files that are damaged are told of.
        """
        path = self.folder / FILE
        if not path.exists():
            return False
        try:
            saved = read_signed(path)
            self._check_sizes()
            self._hash(saved["images"])
        except MoeeError as error:
            damage = error.found
        except Exception as error:  # a damaged file can break the reader in any way
            damage = str(error)
        else:
            damage = "" if self._told == saved["hashes"] else "other values than were saved"
        if damage:
            tell(f"the recording in '{self.folder}' is damaged ({damage}): it begins again")
            self.images, self.hashes = 0, {}
        return not damage

    @property
    def _told(self) -> dict[str, str]:
        return {".".join(file): found.hexdigest() for file, found in sorted(self.hashes.items())}

    def _check_sizes(self) -> None:
        for file, mapped in self.files.items():
            size = (self.folder / file_name(file)).stat().st_size
            if size != mapped.offset + mapped.nbytes:
                raise ValueError(f"{file_name(file)} has another size")

    def _header(self, file: File, size: int) -> bytes:
        with (self.folder / file_name(file)).open("rb") as opened:
            return opened.read(size)

    def _hash(self, images: int) -> None:
        """Add the rows up to those of so many images."""
        for file, mapped in self.files.items():
            rows = slice(self.images * self.rows[file], images * self.rows[file])
            if file not in self.hashes:
                self.hashes[file] = hashlib.sha256(self._header(file, mapped.offset))
            self.hashes[file].update(np.ascontiguousarray(mapped[rows]))
        self.images = images
