"""Labelled images: class folders on disk, or the bundled scenes; the same interface for both."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image

from moee_analysis import models, scenes
from moee_analysis.errors import MoeeError
from moee_analysis.progress import progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


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
        with _still_there(self.paths[row]), Image.open(self.paths[row]) as image:
            return image.convert("RGB")

    def mask(self, row: int) -> np.ndarray:
        """Refuse: photographs have no part masks."""
        raise MoeeError(
            "images with part masks", f"'{self.paths[row].name}', a photograph",
            "only the bundled scenes know their parts: use load_images('bundled')",
        )  # fmt: skip

    def digest(self, row: int) -> bytes:
        """Hash of the picture's content; raises what :meth:`picture` does."""
        with _still_there(self.paths[row]):
            return hashlib.sha256(self.paths[row].read_bytes()).digest()


@contextmanager
def _still_there(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
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
    could not be read.
    """

    name: str
    source: Source
    rows: tuple[int, ...]
    folders: tuple[str, ...]
    skipped: tuple[str, ...] = ()

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

    def as_seen(self, index: int, model: nn.Module) -> np.ndarray:
        """Image ``index`` cropped and scaled as ``model`` sees it: uint8 (height, width, 3)."""
        steps = models.model_transform(model).transforms[:2]  # resize, crop
        picture = self.picture(index)
        for step in steps:
            picture = step(picture)
        return np.asarray(picture)

    def mask(self, index: int) -> np.ndarray:
        """Part mask of image ``index``: uint8 (height, width), values index ``parts``."""
        return self.source.mask(self.rows[index])

    def labels(self, model: nn.Module) -> np.ndarray:
        """Class index of every image among the outputs of ``model``, int64 (images,).

        Raises
        ------
        MoeeError
            A folder that is none of the model's classes, or could be two of them.
        """
        known = _class_index(model)
        unknown = sorted({f for f in self.folders if _plain(f) not in known})
        if unknown:
            examples = ", ".join(models.class_names(model)[:3])
            raise MoeeError(
                f"folders named after the model's classes (such as {examples})",
                f"{len(unknown)} unknown or ambiguous: {', '.join(unknown[:5])}",
                "rename the folders, or pass the model they belong to",
            )
        return np.array([known[_plain(f)] for f in self.folders], dtype=np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Return the images at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            rows=tuple(self.rows[i] for i in chosen),
            folders=tuple(self.folders[i] for i in chosen),
        )

    def limit(self, count: int | None, *, seed: int = 0) -> ImageSet:
        """At most ``count`` images, as even over the classes as possible, in their old order."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(self._dealt(seed)[:count]))

    def split(self, share: float, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Two disjoint sets: ``share`` of the images, even over the classes, and the rest."""
        dealt = self._dealt(seed)
        count = round(share * len(self))
        return self.take(np.sort(dealt[:count])), self.take(np.sort(dealt[count:]))

    def of_classes(self, folders: Sequence[str]) -> ImageSet:
        """Return the images of these classes only (folder names as in ``folders``)."""
        wanted = {_plain(name) for name in folders}
        return self.take([i for i, name in enumerate(self.folders) if _plain(name) in wanted])

    def batches(self, model: nn.Module, *, batch_size: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the images in order, prepared by the model's own transform.

        Each batch is float32 (batch, channels, height, width); the next one is decoded while
        the present one is used. ``batch_size`` None is :func:`fitting_batch`.
        """
        batch_size = batch_size or fitting_batch(model)
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


def fitting_batch(model: nn.Module) -> int:
    """Images of a batch: the pixels of 64 of 224 x 224, but 256 images at most.

    Small images come in large batches, so that each expert gets tokens worth a matrix product.
    """
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
        No such folder, no images in it, unreadable files with ``strict``, unknown split.
    """
    if str(source) == models.BUNDLED:
        return _bundled(split).limit(limit, seed=seed)
    return _from_folder(Path(source), limit=limit, strict=strict, seed=seed)


def _bundled(split: str) -> ImageSet:
    if split not in scenes.SPLIT_SIZES:
        raise MoeeError(f"a split among {', '.join(scenes.SPLIT_SIZES)}", f"'{split}'", "name one")
    rows = tuple(range(scenes.SPLIT_SIZES[split]))
    labels = tuple(scenes.CLASSES[row % len(scenes.CLASSES)] for row in rows)
    return ImageSet(f"bundled scenes, {split}", Scenes(split), rows, labels)


def _from_folder(folder: Path, *, limit: int | None, strict: bool, seed: int) -> ImageSet:
    if not folder.is_dir():
        raise MoeeError(f"a folder of class folders at '{folder}'", "no folder", "check the path")
    paths = tuple(sorted(p for p in folder.glob("*/**/*") if p.suffix.lower() in SUFFIXES))
    if not paths:
        raise MoeeError(
            f"class folders with images in '{folder}'", "no image in any of its folders",
            f"arrange the images as {folder.name}/<wnid or class name>/<image>",
        )  # fmt: skip
    classes = tuple(path.relative_to(folder).parts[0] for path in paths)
    chosen = ImageSet(folder.name, Folder(paths), tuple(range(len(paths))), classes)
    return _readable(chosen.limit(limit, seed=seed), folder, strict=strict)


def _readable(images: ImageSet, folder: Path, *, strict: bool) -> ImageSet:
    """Drop the images whose files cannot be decoded, by name; refuse them if ``strict``."""
    paths = [images.source.paths[row] for row in images.rows]
    with ThreadPoolExecutor(max_workers=2) as pool:
        decoded = pool.map(_decodes, paths)
        good = list(progress(decoded, label="checking images", total=len(paths), delay=1))
    skipped = tuple(str(p.relative_to(folder)) for p, ok in zip(paths, good, strict=True) if not ok)
    if not skipped:
        return images
    listed = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    if strict or len(skipped) == len(images):
        raise MoeeError(
            f"readable images in '{folder}'", f"{len(skipped)} unreadable: {listed}",
            "mend or remove these files, or load without strict=True",
        )  # fmt: skip
    warnings.warn(
        f"skipped {len(skipped)} of {len(images)} images that cannot be read: {listed}",
        stacklevel=3,
    )
    return replace(images.take(np.flatnonzero(good)), skipped=skipped)


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
    except Exception:  # a damaged file can break a decoder in any way
        return False
    return True


def _class_index(model: nn.Module) -> dict[str, int]:
    """Both the names and the readable labels of the model's classes -> index."""
    return _unambiguous(models.class_labels(model)) | _unambiguous(models.class_names(model))


def _unambiguous(names: Sequence[str]) -> dict[str, int]:
    """Plain name -> index; a name that two classes share (ImageNet's two cranes) is left out."""
    plain = [_plain(name) for name in names]
    seen = Counter(plain)
    return {name: i for i, name in enumerate(plain) if seen[name] == 1}


def _plain(name: str) -> str:
    """``name`` without differences of case, punctuation and Unicode normal form."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", name).casefold())
