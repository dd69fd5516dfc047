"""Batches of labelled images for training, from images that are prepared once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from timm.data import Mixup
from torch import nn
from torch.nn.functional import one_hot

from moee_analysis.data.images import ImageSet
from moee_analysis.models.class_names import count_classes
from moee_analysis.models.loading import model_transform
from moee_analysis.training.augmentation import Augmented, training_transform
from moee_analysis.training.supervised_config import FLIP, SupervisedConfig

Batch = tuple[torch.Tensor, torch.Tensor]


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
        *steps, to_tensor, normalise = model_transform(model).transforms
        pixels = []
        for index in range(len(images)):
            picture = images.picture(index)
            for step in steps:
                picture = step(picture)
            pixels.append((255 * to_tensor(picture)).round().to(torch.uint8))
        labels = torch.from_numpy(images.labels(model))
        return cls(images, torch.stack(pixels), labels, normalise)

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
    mix = Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=smoothing,
        num_classes=classes,
    )  # fmt: skip
    in_memory = config.augmentation in ("none", FLIP)
    for x, labels in (_mirrored if in_memory else _augmented)(loaded, model, config):
        if config.mixes:
            yield mix(x, labels)
        else:
            yield x, one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def _mirrored(loaded: Loaded, _model: nn.Module, config: SupervisedConfig) -> Iterator[Batch]:
    for _, chosen, mirrored in _choose_images(len(loaded), config):
        x = loaded.batch(chosen)
        if config.augmentation == FLIP:
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        yield x, loaded.labels[chosen]


def _augmented(loaded: Loaded, model: nn.Module, config: SupervisedConfig) -> Iterator[Batch]:
    transform = training_transform(model, config.augmentation)
    for passes, chosen, _ in _choose_images(len(loaded), config):
        places = zip(passes.tolist(), chosen.tolist(), strict=True)
        seen = [Augmented(loaded.images, transform, config.seed, n)[image] for n, image in places]
        yield torch.stack(seen), loaded.labels[chosen]


def _choose_images(size: int, config: SupervisedConfig) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of every batch: the pass of each image, which image, whether it is mirrored.

    One pass over the images follows the other, each in a new order; a batch may be of two.
    """
    total, parts = config.steps * config.batch_size, []
    for number in range(-(-total // size)):
        rng = np.random.default_rng([config.seed, number])
        parts.append((np.full(size, number), rng.permutation(size), rng.random(size) < 0.5))
    whole = [
        torch.from_numpy(np.concatenate(column)[:total]) for column in zip(*parts, strict=True)
    ]
    return zip(*(column.split(config.batch_size) for column in whole), strict=True)
