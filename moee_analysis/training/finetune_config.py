"""What decides a fine-tuning."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from moee_analysis.utils import checks

Router = Literal["frozen", "straight_through", "auxiliary"]
Augmentation = Literal["none", "light", "strong"]
Precision = Literal["auto", "float32", "bfloat16"]
CHOICES: dict[str, tuple[str, ...]] = {
    "router": get_args(Router),
    "augmentation": get_args(Augmentation),
    "precision": get_args(Precision),
}


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
      loss has the weight ``router_weight`` (``train_routers``).
    - ``augmentation``: ``none``, ``light`` or ``strong`` (``augmentation``).
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
    router: Router = "frozen"
    router_weight: float = 0.1
    augmentation: Augmentation = "light"
    ema: float | None = None
    held_out: float = 0.1
    patience: int = 3
    clip: float = 1.0
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            checks.one_of(name, getattr(self, name), choices)
        for name in ("epochs", "batch_size", "accumulate", "patience"):
            checks.whole_number(name, getattr(self, name))
        checks.seed_number(self.seed)
        for name in ("learning_rate", "temperature", "clip"):
            checks.real_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "warmup_epochs", "block_weight", "router_weight"):
            checks.real_number(name, getattr(self, name), least=0)
        checks.share("held_out", self.held_out, whole=False)
        for name, value in checks.not_none(self, "ema"):
            checks.share(name, value, whole=False)

    def autocasts(self, device: Any) -> bool:
        """Whether products are made in bfloat16 on this ``device``."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        import torch  # the command line reads these settings, and starts without it

        return device.type == "cuda" and torch.cuda.is_bf16_supported()
