"""What decides a training on labelled images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moee_analysis.clustering import whole_number
from moee_analysis.errors import MoeeError
from moee_analysis.training_images import AUGMENTATIONS

FLIP = "flip"
"""Augmentation by mirroring alone: images are prepared once."""


@dataclass(frozen=True)
class SupervisedConfig:
    """How a model learns the labels of images, by cross-entropy; as MoE Jetpack does, in short.

    Attributes
    ----------
    steps
        Updates, each of ``batch_size`` images; passes over the images follow each other without a
        gap, each in an order of its own.
    learning_rate
        AdamW's, after a linear warm-up over the share ``warmup`` of the steps; from there it falls
        to one percent by a cosine.
    weight_decay
        Of matrices; norms, biases, temperatures and position embeddings have none.
    layer_decay
        Factor between the rates of one layer and the one above. Whatever belongs to a layer with
        experts, and the norm before it, learns at the full rate.
    label_smoothing
        Share of every target that is spread over all classes.
    mixup, cutmix
        Parameters of the Beta distributions of timm's ``Mixup``; 0 switches them off.
    augmentation
        ``none``, ``flip`` (mirror images, one half), ``light`` or ``strong``
        (:mod:`moee_analysis.training_images`).
    balance_weight
        Of the losses by which top-k routers learn to use their experts alike, as in V-MoE
        (:mod:`moee_analysis.routing_losses`).
    clip
        Largest norm of the gradients.
    check_every
        Steps between two looks at images that are not trained on; None: at the end only.
    seed
        Of the order of images, augmentation, and everything random in the model.

    Raises
    ------
    MoeeError
        A value out of its range.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    layer_decay: float = 1.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    augmentation: str = FLIP
    balance_weight: float = 0.01
    clip: float = 5.0
    check_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0)
        known = (FLIP, *AUGMENTATIONS)
        if self.augmentation not in known:
            _refuse(f"augmentation among {', '.join(known)}", self.augmentation)
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(f"{name} above 0", getattr(self, name))
        for name in ("weight_decay", "mixup", "cutmix", "balance_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                _refuse(f"{name} of 0 or more", getattr(self, name))
        self._check_shares()

    def _check_shares(self) -> None:
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(f"{name} from 0 to below 1", getattr(self, name))
        if not 0 < self.layer_decay <= 1:
            _refuse("layer_decay above 0 and up to 1", self.layer_decay)
        if self.mixes and self.batch_size % 2:
            _refuse("an even batch_size with mixup or cutmix", self.batch_size)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def share(self, step: int) -> float:
        """Share of the learning rate in update ``step``, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1, self.steps - 1 - warm)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

    def checked(self, step: int) -> bool:
        """Whether the model is looked at after so many updates."""
        every = self.check_every or self.steps
        return step == self.steps or step % every == 0


def _refuse(expected: str, found: Any) -> None:
    raise MoeeError(expected, str(found), "correct it")
