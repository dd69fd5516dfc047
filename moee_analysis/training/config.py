"""What decides a fine-tuning, and what a training on labelled images; read without torch."""

from dataclasses import dataclass
from typing import Literal

from moee_analysis.errors import MoeeError
from moee_analysis.utils import checks

FLIP = "flip"
"""Augmentation by mirroring alone: images are prepared once."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model learns to predict what its dense model predicts; no labels are used.

    - ``epochs``: passes over the training images.
    - ``learning_rate`` of AdamW, after a warm-up of ``warmup_epochs``; from there it falls to zero
      by a cosine.
    - ``batch_size``: images of one step, over all processes, computed in ``accumulate`` parts.
    - ``temperature`` divides the logits of both models; the loss is in nats at 1.
    - ``block_weight`` of the relative squared errors of all blocks' outputs, beside the logits.
    - ``router``: ``frozen``; learning ``straight_through``, or from an ``auxiliary`` task, whose
      loss has the weight ``router_weight`` (``distillation``).
    - ``augmentation``: ``none``, ``light`` or ``strong`` (``batches``).
    - ``ema``: decay per step of a running mean of the weights, which is then the model that is
      kept; None: the weights themselves.
    - ``held_out``: share of the images that is never trained on. The epoch of the lowest divergence
      there is kept, and ``patience`` epochs without a lower one end the training.
    - ``clip``: largest norm of the gradients.
    - ``precision``: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 on an accelerator
      that has it.
    - ``seed`` of the held-out images, their order and the augmentations.

    Raises ``MoeeError``: a value out of its range.
    """

    epochs: int = 10
    learning_rate: float = 1.5e-5
    batch_size: int = 32
    accumulate: int = 1
    weight_decay: float = 0.01
    warmup_epochs: float = 0.5
    temperature: float = 1.0
    block_weight: float = 0.0
    router: Literal["frozen", "straight_through", "auxiliary"] = "frozen"
    router_weight: float = 0.1
    augmentation: Literal["none", "light", "strong"] = "light"
    ema: float | None = None
    held_out: float = 0.1
    patience: int = 3
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_settings(self)


@dataclass(frozen=True)
class SupervisedConfig:
    """How a model learns the labels of images, by cross-entropy; as MoE Jetpack does, in short.

    - ``steps``: updates, each of ``batch_size`` images; passes over the images follow each other
      without a gap, each in an order of its own.
    - ``learning_rate`` of AdamW, after a linear warm-up over the share ``warmup`` of the steps;
      from there it falls to one percent by a cosine.
    - ``weight_decay`` of matrices; norms, biases, temperatures and position embeddings have none.
    - ``layer_decay``: factor between the rates of one layer and the one above. Layers with experts,
      and the norms before them, learn at the full rate.
    - ``label_smoothing``: share of every target that is spread over all classes.
    - ``mixup``, ``cutmix``: parameters of the Beta distributions of timm's ``Mixup``; 0: off.
    - ``augmentation``: ``none``, ``flip`` (mirror images, one half), ``light`` or ``strong``
      (``batches``).
    - ``balance_weight`` of the loss by which top-k routers learn to use their experts alike, as
      in V-MoE (``sparse_upcycling``).
    - ``clip``: largest norm of the gradients.
    - ``check_every``: steps between two looks at images that are not trained on; None: at the end.
    - ``seed`` of the order of images, augmentation, and everything random in the model.

    Raises ``MoeeError``: a value out of its range.
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
    augmentation: Literal["none", "flip", "light", "strong"] = FLIP
    balance_weight: float = 0.01
    clip: float = 5.0
    check_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_settings(self)
        if self.mixes and self.batch_size % 2:
            expected = "an even batch_size with mixup or cutmix"
            raise MoeeError(expected, str(self.batch_size), "correct it")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0
