"""What decides a conversion by MoE Jetpack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moee_analysis.clustering import whole_number
from moee_analysis.errors import MoeeError

CHOICES = {
    "method": ("importance", "graph", "uniform", "random"),
    "metric": ("L2", "L1", "act_patrn"),
    "router": ("sphero", "soft"),
    "combine": ("softmax", "entmax15"),
    "expert_drop_mode": ("expert", "sample"),
    "head": ("fresh", "recycled"),
}


@dataclass(frozen=True)
class JetpackConfig:
    """How a dense model becomes the start of a mixture of soft experts.

    Which weights are taken over (checkpoint recycling):

    - ``width`` of the new model, at most the dense model's; None: the same. In a model with stages
      it is the last one's, and all others are narrowed alike.
    - ``layers``: the MLPs that get experts, counted from 0; None: the second half of them.
    - ``method``: how units are chosen: drawn with probabilities that follow their activations
      (``importance``), parts of the ``graph`` of what is active together, evenly spaced
      (``uniform``), or at ``random``. ``metric`` is what activations count: their root mean square
      (``L2``), mean magnitude (``L1``), or how often they are positive (``act_patrn``).
    - ``consistent_channels``: one set of channels in all of the model (of a stage, where it has
      stages), as in the paper; or every expert of every layer draws its own, as in the released
      code.
    - ``head``: the classifier starts ``fresh`` (published), or is ``recycled``; a fresh one may
      have other ``num_classes``.

    The layers of experts (SpheroMoE):

    - ``core`` experts have as many hidden neurons as an MLP of the new model, ``universal`` ones
      the share ``universal_ratio`` of these; each expert has so many ``slots``. Both None: half as
      many core experts as the layer has patches, and twice as many universal ones; that gives
      the published 98 and 196 where there are 196 patches.
    - ``router``: ``sphero``, or the plain ``soft`` one of Soft MoE. The others are settings of
      ``sphero``: how outputs are weighted (``combine``), both temperatures at the start,
      ``normalize_key`` (logits are cosines), and the ``noise`` of the logits in training, as a
      standard deviation (None: one over the number of experts).
    - ``expert_drop``: rate at which outputs of experts drop out in training. It rises linearly
      with depth, to this value in the last layer. By ``expert_drop_mode`` whole experts drop out
      (paper), or all experts of an image (released code).
    - ``drop``: dropout inside experts, after the activation and after the second linear map.

    Defaults are those of the released code, but for the channels, ``combine`` and what drops out,
    which are the paper's.

    ``macs_reduction`` is the share of the dense model's MACs to save, at the same width alone. It
    decides the slots of each layer, or the experts where both their numbers are None.
    """

    width: int | None = None
    layers: tuple[int, ...] | None = None
    method: Literal["importance", "graph", "uniform", "random"] = "importance"
    metric: Literal["L2", "L1", "act_patrn"] = "L2"
    consistent_channels: bool = True
    head: Literal["fresh", "recycled"] = "fresh"
    num_classes: int | None = None
    core: int | None = None
    universal: int | None = None
    universal_ratio: float = 0.25
    slots: int = 1
    router: Literal["sphero", "soft"] = "sphero"
    combine: Literal["softmax", "entmax15"] = "softmax"
    temperature: float = 0.5
    normalize_key: bool = True
    noise: float | None = None
    expert_drop: float = 0.1
    expert_drop_mode: Literal["expert", "sample"] = "expert"
    drop: float = 0.4
    seed: int = 0
    macs_reduction: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                found = f"'{getattr(self, name)}'"
                raise MoeeError(f"{name} among {', '.join(choices)}", found, "name one")
        for name, least in {"width": 1, "num_classes": 0, "core": 0, "universal": 0}.items():
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=least)
        whole_number("slots", self.slots, least=1)
        whole_number("seed", self.seed, least=0)
        self._check_shares()
        self._check_experts()
        self._check_together()

    @property
    def needs_images(self) -> bool:
        """Whether activations decide anything."""
        return self.method in ("importance", "graph")

    def _check_shares(self) -> None:
        for name in ("universal_ratio", "macs_reduction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise MoeeError(f"{name} as a share in (0, 1]", str(value), "0.25 means 25 %")
        for name in ("drop", "expert_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise MoeeError(f"{name} as a rate in [0, 1)", str(getattr(self, name)), "lower it")
        if not self.temperature > 0:
            raise MoeeError("a temperature above 0", str(self.temperature), "raise it")
        if self.noise is not None and self.noise < 0:
            raise MoeeError("noise of at least 0", str(self.noise), "0 is none")

    def _check_experts(self) -> None:
        given = [value for value in (self.core, self.universal) if value is not None]
        if len(given) == 1 or (given and not sum(given)):
            raise MoeeError(
                "numbers of core and of universal experts, not both 0, or None for both",
                f"core={self.core}, universal={self.universal}",
                "give both, as in core=98, universal=196",
            )

    def _check_together(self) -> None:
        if self.head == "recycled" and self.num_classes is not None:
            raise MoeeError(
                "num_classes with a fresh head", "a recycled head",
                "leave num_classes to the dense model",
            )  # fmt: skip
        if self.macs_reduction is not None and self.slots != 1:
            raise MoeeError(
                "macs_reduction or slots", "both", "give one of them; the budget decides the slots"
            )
