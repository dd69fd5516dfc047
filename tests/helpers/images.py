"""Small random pictures, as image sets and in folders."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from moee_analysis.data.images import ImageSet
from tests.helpers.models import CLASSES


@dataclass(frozen=True)
class Noise:
    """Pictures of coloured noise."""

    parts: tuple[str, ...] = ()

    def picture(self, row: int) -> Image.Image:
        rng = np.random.default_rng(row)
        tint = rng.uniform(size=3)
        pixels = 255 * (0.5 * tint + 0.5 * rng.uniform(size=(32, 32, 3)))
        return Image.fromarray(pixels.astype(np.uint8))

    def digest(self, row: int) -> bytes:
        return hashlib.sha256(self.picture(row).tobytes()).digest()


def toy_images(count: int = 24) -> ImageSet:
    """``count`` images, dealt to the classes in turn."""
    folders = tuple(CLASSES[i % len(CLASSES)] for i in range(count))
    return ImageSet("noise", Noise(), tuple(range(count)), folders)


def picture(seed: int, *, size: int = 32, mode: str = "RGB") -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def image_folder(root: Path, classes: dict[str, int], *, first: int = 0) -> Path:
    """``root`` filled with so many pictures for each class folder, numbered from ``first`` on."""
    for number, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            picture(1000 * number + first + index).save(folder / f"{index}.png")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of ``folder`` hold."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
