"""What decides a conversion by MoE Jetpack."""

from dataclasses import dataclass
from typing import Literal

from moee_analysis.errors import MoeeError
from moee_analysis.utils.checks import check_settings


@dataclass(frozen=True)
class JetpackConfig:
    """How a dense model becomes the start of a mixture of soft experts.

    Which weights are taken over (checkpoint recycling):

    - ``width`` of the new model, at most the dense model's; None: the same. In a model with stages
      it is the last one's, and all others are narrowed alike.
    - ``layers``: the MLPs that get experts, counted from 0; None: the second half of them.
    - ``method``: units are drawn by their root mean square activation (``importance``) or as parts
      of the ``graph`` of what is active together, evenly spaced (``uniform``), or at ``random``.
    - ``consistent_channels``: one set of channels for the model, or each stage, as in the paper; or
      every expert of every layer draws its own, as in the released code.
    - ``head``: the classifier starts ``fresh`` (published), or is ``recycled``.

    The layers of experts (SpheroMoE):

    - ``core`` experts have as many hidden neurons as an MLP of the new model, ``universal`` ones
      the share ``universal_ratio`` of these; each expert has so many ``slots``. Both None: half as
      many core experts as the layer has patches, and twice as many universal ones (published: 98
      and 196 for 196 patches).
    - ``router``: ``sphero``, or the plain ``soft`` one of Soft MoE. ``temperature`` and ``noise``
      are settings of :class:`SpheroRouter`.
    - ``expert_drop``: rate at which outputs of whole experts drop out in training, which rises
      linearly to this value in the last layer. ``drop``: dropout inside experts, after the
      activation and after the second linear map.

    Defaults are those of the released code; for channels, the softmax that combines slots, and what
    drops out, the paper's. ``macs_reduction`` is the share of the dense model's MACs to save, at
    the same width alone, by slots, or by experts where both their numbers are None.
    """

    width: int | None = None
    layers: tuple[int, ...] | None = None
    method: Literal["importance", "graph", "uniform", "random"] = "importance"
    consistent_channels: bool = True
    head: Literal["fresh", "recycled"] = "fresh"
    core: int | None = None
    universal: int | None = None
    universal_ratio: float = 0.25
    slots: int = 1
    router: Literal["sphero", "soft"] = "sphero"
    temperature: float = 0.5
    noise: float | None = None
    expert_drop: float = 0.1
    drop: float = 0.4
    seed: int = 0
    macs_reduction: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        given = [value for value in (self.core, self.universal) if value is not None]
        if len(given) == 1 or (given and not sum(given)):
            raise MoeeError(
                "numbers of core and of universal experts, not both 0, or None for both",
                f"core={self.core}, universal={self.universal}",
                "give both, as in core=98, universal=196",
            )
        if self.macs_reduction is not None and self.slots != 1:
            raise MoeeError(
                "macs_reduction or slots", "both", "give one of them; the budget decides the slots"
            )
