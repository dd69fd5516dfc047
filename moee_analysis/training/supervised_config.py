"""What decides a training on labelled images."""

from dataclasses import dataclass

from moee_analysis.errors import MoeeError
from moee_analysis.training.augmentation import AUGMENTATIONS
from moee_analysis.utils import checks

FLIP = "flip"
"""Augmentation by mirroring alone: images are prepared once."""


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
      (``augmentation``).
    - ``balance_weight`` of the losses by which top-k routers learn to use their experts alike, as
      in V-MoE (``sparse_moe_layer``).
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
    augmentation: str = FLIP
    balance_weight: float = 0.01
    clip: float = 5.0
    check_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            checks.whole_number(name, getattr(self, name))
        for name, value in checks.not_none(self, "check_every"):
            checks.whole_number(name, value)
        checks.seed_number(self.seed)
        checks.one_of("augmentation", self.augmentation, (FLIP, *AUGMENTATIONS))
        for name in ("learning_rate", "clip"):
            checks.real_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "mixup", "cutmix", "balance_weight"):
            checks.real_number(name, getattr(self, name), least=0)
        for name in ("warmup", "label_smoothing"):
            checks.real_number(name, getattr(self, name), least=0, below=1)
        checks.share("layer_decay", self.layer_decay)
        if self.mixes and self.batch_size % 2:
            raise MoeeError(
                "an even batch_size with mixup or cutmix", str(self.batch_size), "correct it"
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def checks_after(self, step: int) -> bool:
        """Whether the model is looked at after so many updates."""
        return step == self.steps or step % (self.check_every or self.steps) == 0
