"""Labelled images: class folders on disk, or the bundled scenes; the same interface for both."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from moee_analysis.data.image_files import (
    Skipped,
    list_images,
    readable_name,
    skipped_text,
    unreadable_among,
)
from moee_analysis.data.pictures import UnreadableError, read_picture
from moee_analysis.data.scenes import scene as scenes
from moee_analysis.errors import MoeeError
from moee_analysis.models import loading as models
from moee_analysis.models.class_names import index_of_classes, plain_name
from moee_analysis.utils.checks import one_of, real_number, seed_number, whole_number
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import is_folder


class Source(Protocol):
    """Where pictures come from: picture ``row``, its part mask if it has one, its content."""

    parts: tuple[str, ...]

    def picture(self, row: int) -> Image.Image:
        """RGB picture number ``row``."""

    def mask(self, row: int) -> np.ndarray:
        """Part of every pixel, uint8 (height, width)."""

    def digest(self, row: int) -> bytes:
        """Hash of the picture's content."""


@dataclass(frozen=True)
class Folder:
    """Image files on disk."""

    paths: tuple[Path, ...]
    parts: tuple[str, ...] = ()

    def picture(self, row: int) -> Image.Image:
        """RGB picture number ``row``.

        Raises
        ------
        MoeeError
            The file cannot be read any more.
        """
        with _still_there(self.paths[row]):
            return read_picture(self.paths[row])

    def mask(self, row: int) -> np.ndarray:
        """Refuse: photographs have no part masks."""
        raise MoeeError(
            "images with part masks", f"'{self.paths[row].name}', a photograph",
            "only the bundled scenes know their parts: use load_images('bundled')",
        )  # fmt: skip

    def digest(self, row: int) -> bytes:
        """Hash of the file's content; raises what :meth:`picture` does."""
        with _still_there(self.paths[row]):
            return hashlib.sha256(self.paths[row].read_bytes()).digest()


@contextmanager
def _still_there(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnreadableError) as error:
        raise MoeeError(
            f"the image '{path}', which could be read before", str(error),
            "put it back, or load the images again",
        ) from None  # fmt: skip


@dataclass(frozen=True)
class Scenes:
    """The rendered scenes of one split."""

    split: str
    parts: tuple[str, ...] = scenes.PARTS

    def picture(self, row: int) -> Image.Image:
        """RGB picture number ``row``."""
        return Image.fromarray(_scene(self.split, row).image)

    def mask(self, row: int) -> np.ndarray:
        """Part of every pixel, uint8 (64, 64)."""
        return _scene(self.split, row).parts.copy()

    def digest(self, row: int) -> bytes:
        """Hash of the picture's content."""
        return hashlib.sha256(_scene(self.split, row).image.tobytes()).digest()


@lru_cache(maxsize=4096)
def _scene(split: str, row: int) -> scenes.Scene:
    """Keep what was rendered: 16 kB a scene, and a notebook passes over its images many times."""
    return scenes.scene(split, row)


@dataclass(frozen=True)
class ImageSet:
    """An ordered set of labelled images.

    ``folders`` names the class of each image as its source does (wnid or class name),
    ``rows`` says which picture of ``source`` each image is, ``skipped`` lists the files that
    were not read, ``skipped_text`` says why. ``classes`` are all class folders of the source, in
    order, also those of which no image is in the set.
    """

    name: str
    source: Source
    rows: tuple[int, ...]
    folders: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    skipped_text: str = ""
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.classes:
            object.__setattr__(self, "classes", tuple(sorted(set(self.folders))))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the part-mask values; empty where there are no masks."""
        return self.source.parts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the list of images: classes and contents, in order."""
        digest = hashlib.sha256()
        images = zip(self.rows, self.folders, strict=True)
        for row, folder in progress(images, label="hashing images", total=len(self), delay=1):
            digest.update(folder.encode() + b"\0" + self.source.digest(row))
        return digest.hexdigest()

    def picture(self, index: int) -> Image.Image:
        """Image ``index`` as it is in the source."""
        return self.source.picture(self.rows[index])

    def name_of(self, index: int) -> str:
        """Where image ``index`` comes from: its file, or its number and class."""
        paths = getattr(self.source, "paths", None)
        row = self.rows[index]
        return f"image {row} ({self.folders[index]})" if paths is None else str(paths[row])

    def as_seen(self, index: int, model: nn.Module) -> np.ndarray:
        """Image ``index`` cropped and scaled as ``model`` sees it: uint8 (height, width, 3)."""
        *steps, _to_tensor, _normalise = models.model_transform(model).transforms
        picture = self.picture(index)
        for step in steps:
            picture = step(picture)
        return np.asarray(picture)

    def mask(self, index: int) -> np.ndarray:
        """Part mask of image ``index``: uint8 (height, width), values index ``parts``."""
        return self.source.mask(self.rows[index])

    def labels(self, model: nn.Module) -> np.ndarray:
        """Class index of every image among the outputs of ``model``, int64 (images,).

        A classifier that does not name its classes is taken to have been trained on the class
        folders in their order, if there is one for each output; that is told.

        Raises
        ------
        MoeeError
            A model without classes; a folder that is none of them, or could be two of them.
        """
        known = index_of_classes(model, self.classes)
        found = {f: known.get(f, known.get(plain_name(f))) for f in set(self.folders)}
        unknown = sorted(folder for folder, index in found.items() if index is None)
        if unknown:
            examples = ", ".join(models.class_names(model)[:3])
            raise MoeeError(
                f"folders named after the model's classes (such as {examples})",
                f"{len(unknown)} unknown or ambiguous: {', '.join(unknown[:5])}",
                "rename the folders, or name the model's own classes: --classes FILE, or "
                "moee.name_classes(model, names)",
            )
        return np.array([found[f] for f in self.folders], dtype=np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            rows=tuple(self.rows[i] for i in chosen),
            folders=tuple(self.folders[i] for i in chosen),
        )

    def limit(self, count: int | None, *, seed: int = 0) -> ImageSet:
        """At most ``count`` images, as even over the classes as possible, in their old order.

        Raises
        ------
        MoeeError
            Fewer than one image.
        """
        _check_draw(count, seed)
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(self._dealt(seed)[:count]))

    def split(self, share: float, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Two disjoint sets: ``share`` of the images, even over the classes, and the rest.

        Raises
        ------
        MoeeError
            A share that is not from 0 to 1.
        """
        real_number("share", share, least=0, most=1)
        seed_number(seed)
        dealt = self._dealt(seed)
        count = round(share * len(self))
        return self.take(np.sort(dealt[:count])), self.take(np.sort(dealt[count:]))

    def of_classes(self, folders: Sequence[str]) -> ImageSet:
        """Return the images of these classes only (folder names as in ``folders``)."""
        if set(folders) <= set(self.classes):
            return self.take([i for i, name in enumerate(self.folders) if name in folders])
        wanted = {plain_name(name) for name in folders}
        return self.take([i for i, name in enumerate(self.folders) if plain_name(name) in wanted])

    def batches(self, model: nn.Module, *, batch_size: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the images in order, prepared by the model's own transform.

        Each batch is float32 (batch, channels, height, width); the next one is decoded while
        the present one is used. ``batch_size`` None is :func:`fitting_batch`.
        """
        batch_size = fitting_batch(model, batch_size)
        transform = models.model_transform(model)
        starts = range(0, len(self), batch_size)
        with ThreadPoolExecutor(max_workers=2) as pool:
            waiting: list[Iterator[torch.Tensor]] = []
            for start in starts:
                indices = range(start, min(start + batch_size, len(self)))
                waiting.append(pool.map(lambda i: transform(self.picture(i)), indices))
                if len(waiting) == 2:
                    yield torch.stack(list(waiting.pop(0)))
            if waiting:
                yield torch.stack(list(waiting.pop()))

    def _dealt(self, seed: int) -> np.ndarray:
        """Indices in an order that visits every class once before any class twice."""
        shuffled = np.random.default_rng(seed).permutation(len(self))
        seen: dict[str, int] = {}
        turns = np.empty(len(self), dtype=np.int64)
        for index in shuffled:
            turns[index] = seen.get(self.folders[index], 0)
            seen[self.folders[index]] = turns[index] + 1
        return shuffled[np.argsort(turns[shuffled], kind="stable")]


def fitting_batch(model: nn.Module, wanted: int | None = None) -> int:
    """Images of a batch: as ``wanted``, or the pixels of 64 of 224 x 224, but 256 images at most.

    Small images come in large batches, so that each expert gets tokens worth a matrix product.

    Raises
    ------
    MoeeError
        ``wanted`` is no number of images.
    """
    if wanted is not None and wanted != 0:
        whole_number("batch_size", wanted)
        return wanted
    _, height, width = models.input_size(model)
    return max(1, min(256, 64 * 224 * 224 // (height * width)))


def load_images(
    source: str | Path = models.BUNDLED,
    *,
    split: str = "evaluation",
    limit: int | None = None,
    strict: bool = False,
    seed: int = 0,
) -> ImageSet:
    """Load labelled images.

    Parameters
    ----------
    source
        ``"bundled"`` for the rendered scenes, or a folder that holds one folder per class,
        named by wnid or class name.
    split
        ``"calibration"`` or ``"evaluation"`` of the bundled scenes; a folder has no splits.
    limit
        At most so many images, even over the classes, drawn with ``seed``.
    strict
        Refuse a folder with unreadable files instead of skipping them with a warning.

    Raises
    ------
    MoeeError
        No such folder, no images in it, unreadable files with ``strict``, unknown split; a limit
        below 1.
    """
    _check_draw(limit, seed)
    if not str(source).strip():
        raise MoeeError("a folder of class folders", "no name", "name it; '.' is the present one")
    if str(source) == models.BUNDLED:
        return _bundled(split).limit(limit, seed=seed)
    return _from_folder(Path(source), limit=limit, strict=strict, seed=seed)


def _check_draw(limit: int | None, seed: int) -> None:
    if limit is not None:
        whole_number("limit", limit)
    seed_number(seed)


def _bundled(split: str) -> ImageSet:
    one_of("a split", split, scenes.SPLIT_SIZES)
    rows = tuple(range(scenes.SPLIT_SIZES[split]))
    labels = tuple(scenes.CLASSES[row % len(scenes.CLASSES)] for row in rows)
    name = f"bundled scenes, {split}"
    return ImageSet(name, Scenes(split), rows, labels, classes=tuple(sorted(scenes.CLASSES)))


def _from_folder(folder: Path, *, limit: int | None, strict: bool, seed: int) -> ImageSet:
    if not is_folder(folder):
        raise MoeeError(f"a folder of class folders at '{folder}'", "no folder", "check the path")
    listing = list_images(folder)
    if not listing.paths:
        found = f"none ({skipped_text(listing.skipped)})" if listing.skipped else "none"
        raise MoeeError(
            f"class folders with images in '{folder}'", found,
            f"arrange the images as {folder.name}/<wnid or class name>/<image>",
        )  # fmt: skip
    folders = tuple(readable_name(path.relative_to(folder).parts[0]) for path in listing.paths)
    classes = tuple(sorted(set(folders)))
    rows = tuple(range(len(folders)))
    name, source = readable_name(folder.name), Folder(listing.paths)
    images = ImageSet(name, source, rows, folders, classes=classes)
    return _readable(images.limit(limit, seed=seed), folder, listing.skipped, strict=strict)


def _readable(
    images: ImageSet, folder: Path, skipped: Sequence[Skipped], *, strict: bool
) -> ImageSet:
    """Drop the images whose files cannot be decoded, by name; refuse them if ``strict``."""
    bad = unreadable_among([images.source.paths[row] for row in images.rows], folder)
    if bad and (strict or len(bad) == len(images)):
        raise MoeeError(
            f"readable images in '{folder}'",
            f"{len(bad)} unreadable: {skipped_text(list(bad.values()))}",
            "mend or remove these files, or load without strict=True",
        )
    skipped = [*bad.values(), *skipped]
    if not skipped:
        return images
    told = skipped_text(skipped)
    place = readable_name(str(folder))
    warnings.warn(f"skipped {len(skipped)} files in '{place}': {told}", stacklevel=4)
    good = images.take([i for i in range(len(images)) if i not in bad])
    return replace(good, skipped=tuple(each.path for each in skipped), skipped_text=told)
