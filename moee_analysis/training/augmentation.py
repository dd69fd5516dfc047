"""Augmented images for training, each by a seed of its own: any number of processes sees the same.

timm's transforms draw from the random states of Python, NumPy and torch, which are set before every
image and given back afterwards.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.inputs import data_config, model_transform, transform_of
from moee_analysis.utils.distributed import processes, rank

AUGMENTATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "light": {"scale": (0.5, 1.0), "ratio": (0.85, 1.18), "color_jitter": None},
    "strong": {"color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
}
"""Settings of timm's ``create_transform``: images as they are evaluated; crops and mirror images;
DeiT's recipe (Touvron et al., arXiv:2012.12877)."""


def training_transform(model: nn.Module, augmentation: str) -> Callable:
    """Transform (PIL image -> float tensor) of the name, for images of the model's own size.

    Raises ``MoeeError``: no augmentation of this name.
    """
    if augmentation not in AUGMENTATIONS:
        raise MoeeError(
            f"an augmentation among {', '.join(AUGMENTATIONS)}", f"'{augmentation}'", "name one"
        )
    settings = AUGMENTATIONS[augmentation]
    if settings is None:
        return model_transform(model)
    return transform_of(data_config(model), **settings)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """While open, the random states of Python, NumPy and torch (CPU) are those of ``numbers``."""
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

    The last batch of all has fewer images; one that has fewer images than there are processes is
    left out.
    """
    order = np.random.default_rng([seen.seed, seen.epoch]).permutation(len(seen)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = [batch[rank() :: processes()] for batch in batches if len(batch) >= processes()]
    workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 1))
    return DataLoader(seen, batch_sampler=own, num_workers=workers, pin_memory=workers > 0)
