"""Batches of images for training: labelled ones that are prepared once, and augmented ones.

Every augmented image has a seed of its own, so that any number of processes sees the same.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from timm.data import Mixup
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from moee_analysis.data.images import ImageSet
from moee_analysis.models.class_names import count_classes
from moee_analysis.models.inputs import data_config, model_transform, transform_of
from moee_analysis.training.config import FLIP, SupervisedConfig
from moee_analysis.utils.distributed import processes, rank

Batch = tuple[torch.Tensor, torch.Tensor]

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"scale": (0.5, 1.0), "ratio": (0.85, 1.18), "color_jitter": None},
    "strong": {"color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
}
"""Settings of timm's ``create_transform``: images as they are evaluated; crops and mirror images;
DeiT's recipe (Touvron et al., arXiv:2012.12877)."""


def training_transform(model: nn.Module, augmentation: str) -> Callable:
    """Transform (PIL image -> float tensor) of a known name, for images of the model's own size."""
    return transform_of(data_config(model), **AUGMENTATIONS[augmentation])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """While open, the random states that timm's transforms draw from are those of ``numbers``."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Augmented(Dataset):
    """Images as one epoch sees them: float tensors (channels, height, width)."""

    images: ImageSet
    transform: Callable
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        with seeded(self.seed, self.epoch, index):
            return self.transform(self.images.picture(index))


def epoch_batches(seen: Augmented, batch_size: int, *, device: torch.device) -> DataLoader:
    """One pass over all images in a new order, in batches of which each process gets its share.

    The last one is smaller, and left out if it has fewer images than there are processes.
    """
    order = np.random.default_rng([seen.seed, seen.epoch]).permutation(len(seen)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = [batch[rank() :: processes()] for batch in batches if len(batch) >= processes()]
    workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 1))
    return DataLoader(seen, batch_sampler=own, num_workers=workers, pin_memory=workers > 0)


@dataclass(frozen=True)
class Loaded:
    """Labelled ``images`` in memory, cropped and scaled as models of one kind see them.

    ``pixels`` are uint8 (images, channels, height, width): 12 kB for a scene, 150 kB for 224 x 224;
    ``labels`` int64 (images,), indices of the model's classes. ``normalise`` takes floats from 0 to
    1 to the input of the model.
    """

    images: ImageSet
    pixels: torch.Tensor
    labels: torch.Tensor
    normalise: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, images: ImageSet | Self, model: nn.Module) -> Self:
        """Decode ``images`` for ``model``; loaded ones stay as they are."""
        if isinstance(images, cls):
            return images
        *steps, normalise = model_transform(model).transforms
        pictures = map(Compose(steps), map(images.picture, range(len(images))))
        pixels = torch.stack([(255 * each).round().to(torch.uint8) for each in pictures])
        return cls(images, pixels, torch.from_numpy(images.labels(model)), normalise)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: torch.Tensor | slice) -> torch.Tensor:
        """Images as the model takes them, float32 (chosen, channels, height, width)."""
        return self.normalise(self.pixels[chosen].float() / 255)


def training_batches(loaded: Loaded, model: nn.Module, config: SupervisedConfig) -> Iterator[Batch]:
    """Yield images and targets (batch, classes) for each update of one training.

    timm's ``Mixup`` draws from NumPy's random state as it finds it.
    """
    smoothing, classes = config.label_smoothing, count_classes(model)
    mix = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)
    for x, labels in _training_images(loaded, model, config):
        if config.mixes:
            yield mix(x, labels)
        else:
            yield x, one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def _training_images(loaded: Loaded, model: nn.Module, config: SupervisedConfig) -> Iterator[Batch]:
    in_memory = config.augmentation in ("none", FLIP)
    transform = None if in_memory else training_transform(model, config.augmentation)
    for passes, chosen, mirrored in _choose_images(len(loaded), config):
        if in_memory:
            x = loaded.batch(chosen)
            if config.augmentation == FLIP:
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        else:
            places = zip(passes.tolist(), chosen.tolist(), strict=True)
            seen = (Augmented(loaded.images, transform, config.seed, n)[i] for n, i in places)
            x = torch.stack(list(seen))
        yield x, loaded.labels[chosen]


def _choose_images(size: int, config: SupervisedConfig) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of every batch: the pass of each image, which image, whether it is mirrored.

    One pass over the images follows the other, each in a new order; a batch may be of two.
    """
    total, parts = config.steps * config.batch_size, []
    for number in range(-(-total // size)):
        rng = np.random.default_rng([config.seed, number])
        parts.append((np.full(size, number), rng.permutation(size), rng.random(size) < 0.5))
    columns = (torch.from_numpy(np.concatenate(each)[:total]) for each in zip(*parts, strict=True))
    return zip(*(column.split(config.batch_size) for column in columns), strict=True)
