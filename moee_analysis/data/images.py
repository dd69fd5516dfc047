"""Labelled images: class folders on disk, or the bundled scenes; the same interface for both."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from moee_analysis.data import image_files
from moee_analysis.data.image_files import readable_name, skipped_text
from moee_analysis.data.scenes import scene as scenes
from moee_analysis.data.scenes.canvas import PARTS
from moee_analysis.errors import MoeeError
from moee_analysis.models import loading as models
from moee_analysis.models.class_names import index_of_classes, plain_name
from moee_analysis.utils.checks import one_of, real_number, seed_number, whole_number
from moee_analysis.utils.progress import progress

RENAME = (
    "rename the folders, or name the model's own classes: --classes FILE, or "
    "moee.name_classes(model, names)"
)
T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """Image files on disk, which may have changed since they were listed: a ``MoeeError`` then."""

    paths: tuple[Path, ...]
    parts: tuple[str, ...] = ()

    def picture(self, row: int) -> Image.Image:
        """RGB picture."""
        return self._read(row, image_files.read_picture)

    def digest(self, row: int) -> bytes:
        """Hash of the file's content."""
        return hashlib.sha256(self._read(row, Path.read_bytes)).digest()

    def _read(self, row: int, read: Callable[[Path], T]) -> T:
        try:
            return read(self.paths[row])
        except (OSError, Image.DecompressionBombError, image_files.UnreadableError) as error:
            expected = f"the image '{self.paths[row]}', which could be read before"
            raise MoeeError(expected, str(error), "put it back, or load the images again") from None


@dataclass(frozen=True)
class Scenes:
    """The rendered scenes of one split; ``parts`` names the values of their masks."""

    split: str
    parts: tuple[str, ...] = PARTS

    def picture(self, row: int) -> Image.Image:
        """RGB picture."""
        return Image.fromarray(_scene(self.split, row).image)

    def mask(self, row: int) -> np.ndarray:
        """Part of every pixel, uint8 (64, 64)."""
        return _scene(self.split, row).parts.copy()

    def digest(self, row: int) -> bytes:
        """Hash of what renders the picture: it need not be rendered to be told from others."""
        return hashlib.sha256(f"{scenes.edition()} {self.split} {row}".encode()).digest()


@lru_cache(maxsize=4096)  # of 16 kB; a notebook passes over its images many times
def _scene(split: str, row: int) -> scenes.Scene:
    return scenes.render(scenes.SPLIT_SEEDS[split], row)


@dataclass(frozen=True)
class ImageSet:
    """An ordered set of labelled images.

    ``rows`` says which picture of ``source`` each image is, ``folders`` its class (wnid or class
    name); ``classes`` are all of the source, in order. ``skipped`` are files that were not read.
    """

    name: str
    source: Folder | Scenes
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

    def mask(self, index: int) -> np.ndarray:
        """Part mask of image ``index``: uint8 (height, width), values index ``parts``."""
        if not self.parts:
            found = f"'{self.name_of(index)}', a photograph"
            hint = "only the bundled scenes know their parts: use load_images('bundled')"
            raise MoeeError("images with part masks", found, hint)
        return self.source.mask(self.rows[index])

    def name_of(self, index: int) -> str:
        """Where image ``index`` comes from: its file, or its number and class."""
        paths, row = getattr(self.source, "paths", None), self.rows[index]
        return f"image {row} ({self.folders[index]})" if paths is None else str(paths[row])

    def as_seen(self, index: int, model: nn.Module) -> np.ndarray:
        """Image ``index`` cropped and scaled as ``model`` sees it: uint8 (height, width, 3)."""
        picture = self.picture(index)
        for step in models.model_transform(model).transforms[:-2]:  # no tensor, not normalised
            picture = step(picture)
        return np.asarray(picture)

    def labels(self, model: nn.Module) -> np.ndarray:
        """Class index of every image among the outputs of ``model``, int64 (images,).

        The class folders in their order, one for each output, stand for classes without names.

        Raises MoeeError: a model without classes; a folder that is none of them, or could be two.
        """
        index_of = index_of_classes(model, self.classes)
        found = {f: index_of.get(f, index_of.get(plain_name(f))) for f in set(self.folders)}
        if unknown := sorted(folder for folder, index in found.items() if index is None):
            examples = ", ".join(models.class_names(model)[:3])
            expected = f"folders named after the model's classes (such as {examples})"
            found = f"{len(unknown)} unknown or ambiguous: {', '.join(unknown[:5])}"
            raise MoeeError(expected, found, RENAME)
        return np.array([found[f] for f in self.folders], dtype=np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Return the images at ``indices``, in that order."""
        rows, folders = ([values[int(i)] for i in indices] for values in (self.rows, self.folders))
        return replace(self, rows=tuple(rows), folders=tuple(folders))

    def limit(self, count: int | None, *, seed: int = 0) -> Self:
        """At most ``count`` images, at least 1, even over the classes, in their old order."""
        seed_number(seed)
        if count is None:
            return self
        whole_number("limit", count)
        return self if count >= len(self) else self.take(np.sort(self._deal(seed)[:count]))

    def split(self, share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """Two disjoint sets, even over the classes: ``share`` (0 to 1) of the images, the rest."""
        real_number("share", share, least=0, most=1)
        seed_number(seed)
        order, count = self._deal(seed), round(share * len(self))
        return self.take(np.sort(order[:count])), self.take(np.sort(order[count:]))

    def _deal(self, seed: int) -> np.ndarray:
        """Indices in a random order that visits every class once before any class twice."""
        shuffled = np.random.default_rng(seed).permutation(len(self))
        folders = pd.Series(self.folders, dtype=object).iloc[shuffled]
        turns = folders.groupby(folders, sort=False).cumcount()
        return shuffled[np.argsort(turns.to_numpy(), kind="stable")]

    def of_classes(self, folders: Sequence[str]) -> Self:
        """Return the images of these classes only (folder names)."""
        as_named = str if set(folders) <= set(self.classes) else plain_name
        wanted = set(map(as_named, folders))
        return self.take([i for i, name in enumerate(self.folders) if as_named(name) in wanted])

    def batches(self, model: nn.Module, *, batch_size: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the images in order, prepared by the model's own transform, float32 (B, C, H, W).

        The next batch is decoded while one is used. ``batch_size`` None is :func:`fitting_batch`.
        """
        batch_size, transform = fitting_batch(model, batch_size), models.model_transform(model)
        with ThreadPoolExecutor(max_workers=2) as pool:
            ahead: list[Iterator[torch.Tensor]] = []
            for start in range(0, len(self), batch_size):
                indices = range(start, min(start + batch_size, len(self)))
                ahead.append(pool.map(lambda i: transform(self.picture(i)), indices))
                if start:
                    yield torch.stack(list(ahead.pop(0)))
            yield from (torch.stack(list(batch)) for batch in ahead)


def fitting_batch(model: nn.Module, wanted: int | None = None) -> int:
    """Images of a batch: as ``wanted``, or the pixels of 64 of 224 x 224, but 256 images at most.

    Small images come in large batches, so that each expert gets tokens worth a matrix product.
    """
    if wanted:
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
    """Load labelled images: the rendered scenes, ``"bundled"``, or a folder of class folders.

    These are named by wnid or class name. A ``split``, "train", "calibration" or "evaluation", is
    one of the scenes; of a folder ``strict`` refuses unreadable files, which are otherwise skipped
    with a warning. ``limit`` images at most are even over the classes, drawn with ``seed``.

    Raises MoeeError: no such folder, no images in it, unreadable files with ``strict``, unknown
    split; a limit below 1.
    """
    seed_number(seed)
    if limit is not None:
        whole_number("limit", limit)
    if not str(source).strip():
        raise MoeeError("a folder of class folders", "no name", "name it; '.' is the present one")
    if str(source) == models.BUNDLED:
        one_of("a split", split, scenes.SPLIT_SIZES)
        rows = tuple(range(scenes.SPLIT_SIZES[split]))
        folders = tuple(scenes.CLASSES[row % len(scenes.CLASSES)] for row in rows)
        images = ImageSet(f"bundled scenes, {split}", Scenes(split), rows, folders)
        return images.limit(limit, seed=seed)
    return _from_folder(Path(source), limit, seed=seed, strict=strict)


def _from_folder(folder: Path, limit: int | None, *, seed: int, strict: bool) -> ImageSet:
    if not os.path.isdir(folder):  # noqa: PTH112 (no error for a name that is too odd)
        raise MoeeError(f"a folder of class folders at '{folder}'", "no folder", "check the path")
    paths, skipped = image_files.list_images(folder)
    if not paths:
        found = f"none ({skipped_text(_by_name(skipped, folder))})" if skipped else "none"
        hint = f"arrange the images as {folder.name}/<wnid or class name>/<image>"
        raise MoeeError(f"class folders with images in '{folder}'", found, hint)
    folders = tuple(readable_name(path.relative_to(folder).parts[0]) for path in paths)
    source, rows = Folder(tuple(paths)), tuple(range(len(paths)))
    images = ImageSet(readable_name(folder.name), source, rows, folders).limit(limit, seed=seed)
    bad = image_files.find_unreadable([paths[row] for row in images.rows])
    if bad and (strict or len(bad) == len(images)):
        found = f"{len(bad)} unreadable: {skipped_text(_by_name(bad, folder))}"
        hint = "mend or remove these files, or load without strict=True"
        raise MoeeError(f"readable images in '{folder}'", found, hint)
    reasons = _by_name({**bad, **skipped}, folder)
    if not reasons:
        return images
    text, place = skipped_text(reasons), readable_name(folder)
    warnings.warn(f"skipped {len(reasons)} files in '{place}': {text}", stacklevel=3)
    good = images.take([i for i, row in enumerate(images.rows) if paths[row] not in bad])
    return replace(good, skipped=tuple(reasons), skipped_text=text)


def _by_name(reasons: Mapping[Path, str], folder: Path) -> dict[str, str]:
    return {readable_name(path.relative_to(folder)): why for path, why in reasons.items()}
