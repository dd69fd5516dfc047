"""Batches of labelled images for training, from images that are prepared once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Loaded:
    """Labelled images in memory, cropped and scaled as models of one kind see them.

    Attributes
    ----------
    images
        Where they are from.
    pixels
        uint8 (images, channels, height, width): 12 kB for a scene, 150 kB for 224 x 224.
    labels
        int64 (images,): indices of the model's classes.
    normalise
        Takes floats from 0 to 1 to what the model takes.
    """

    images: ImageSet
    pixels: torch.Tensor
    labels: torch.Tensor
    normalise: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, images: ImageSet | Loaded, model: nn.Module) -> Loaded:
        """Decode ``images`` for ``model``; what is loaded stays as it is."""
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


@dataclass(frozen=True)
class Batches:
    """Images and targets (batch, classes) for each update of one training.

    One pass over the images follows the other, each in a new order; a batch may be of two. timm's
    ``Mixup`` draws from NumPy's random state as it finds it.
    """

    loaded: Loaded
    model: nn.Module
    config: SupervisedConfig

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a batch for each update."""
        prepared = self._mirrored() if self._in_memory else self._augmented()
        smoothing, classes = self.config.label_smoothing, count_classes(self.model)
        mix = Mixup(
            mixup_alpha=self.config.mixup, cutmix_alpha=self.config.cutmix,
            label_smoothing=smoothing, num_classes=classes,
        )  # fmt: skip
        for x, labels in prepared:
            if self.config.mixes:
                yield mix(x, labels)
            else:
                yield x, one_hot(labels, classes) * (1 - smoothing) + smoothing / classes

    @property
    def _in_memory(self) -> bool:
        return self.config.augmentation in ("none", FLIP)

    def _mirrored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _, chosen, mirrored in self._drawn():
            x = self.loaded.batch(chosen)
            if self.config.augmentation == FLIP:
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            yield x, self.loaded.labels[chosen]

    def _augmented(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        transform = training_transform(self.model, self.config.augmentation)
        images, seed = self.loaded.images, self.config.seed
        for passes, chosen, _ in self._drawn():
            places = zip(passes.tolist(), chosen.tolist(), strict=True)
            seen = [Augmented(images, transform, seed, number)[image] for number, image in places]
            yield torch.stack(seen), self.loaded.labels[chosen]

    def _drawn(self) -> Iterator[list[torch.Tensor]]:
        """Of every batch: the pass of each image, which image, whether it is mirrored."""
        size, total = len(self.loaded), self.config.steps * self.config.batch_size
        columns: list[list[np.ndarray]] = [[], [], []]
        for number in range(-(-total // size)):
            rng = np.random.default_rng([self.config.seed, number])
            drawn = np.full(size, number), rng.permutation(size), rng.random(size) < 0.5
            for column, values in zip(columns, drawn, strict=True):
                column.append(values)
        whole = [torch.from_numpy(np.concatenate(column)[:total]) for column in columns]
        parts = [column.split(self.config.batch_size) for column in whole]
        return map(list, zip(*parts, strict=True))
