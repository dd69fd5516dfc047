"""What decides a conversion by MoE Jetpack."""

from dataclasses import dataclass
from typing import Literal

from moee_analysis.errors import MoeeError
from moee_analysis.utils import checks


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
        for name, choices in checks.choices_of(JetpackConfig).items():
            checks.one_of(name, getattr(self, name), choices)
        for name, value in checks.not_none(self, "width", "num_classes", "core", "universal"):
            checks.whole_number(name, value, least=1 if name == "width" else 0)
        checks.whole_number("slots", self.slots)
        checks.seed_number(self.seed)
        checks.layer_numbers(self.layers)
        checks.share("universal_ratio", self.universal_ratio)
        if self.macs_reduction is not None:
            checks.share("macs_reduction", self.macs_reduction)
        for name in ("drop", "expert_drop"):
            checks.real_number(name, getattr(self, name), least=0, below=1)
        checks.real_number("temperature", self.temperature, above=0)
        for name, value in checks.not_none(self, "noise"):
            checks.real_number(name, value, least=0)
        self._check_together()

    def _check_together(self) -> None:
        given = [value for value in (self.core, self.universal) if value is not None]
        if len(given) == 1 or (given and not sum(given)):
            raise MoeeError(
                "numbers of core and of universal experts, not both 0, or None for both",
                f"core={self.core}, universal={self.universal}",
                "give both, as in core=98, universal=196",
            )
        if self.head == "recycled" and self.num_classes is not None:
            raise MoeeError(
                "num_classes with a fresh head", "a recycled head",
                "leave num_classes to the dense model",
            )  # fmt: skip
        if self.macs_reduction is not None and self.slots != 1:
            raise MoeeError(
                "macs_reduction or slots", "both", "give one of them; the budget decides the slots"
            )
