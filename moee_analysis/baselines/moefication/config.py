"""What decides a MoEfication."""

from dataclasses import dataclass
from typing import Literal, get_args

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import MACS_REDUCTION
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils import checks

EXPERTS = 96
SMALLEST = 8  # neurons of an expert, where the number of experts is not given

Split = Literal["kmeans", "graph", "random"]
Router = Literal["centre", "mlp", "oracle", "random", "constant"]
Score = Literal["pos", "abs", "out", "var"]
Activation = Literal["own", "relu"]
CHOICES = {"split": Split, "router": Router, "score": Score, "activation": Activation}


@dataclass(frozen=True)
class MoeficationConfig:
    """How the MLPs of a model become experts.

    The budget: ``macs_reduction`` is the share of all MACs of the dense model to save, of which the
    router pays its own; or ``active`` is the share of the experts that each token uses, on average
    over the layers, whatever the router costs (published: 0.2). Neither: 28 % of the MACs.

    - ``n_experts`` of a layer, or ``expert_size`` neurons of an expert; neither: 96 experts of at
      least 8 neurons. Sizes differ by one neuron at most.
    - ``split``: balanced ``kmeans`` of the rows of W1; ``graph``, neurons that are active together;
      or ``random``.
    - ``router``: ``centre``, the nearest mean row of W1; an ``mlp`` that learns the score; the
      ``oracle`` that knows it, which costs half of the MLP or more; or the controls ``random`` and
      ``constant``, the experts of the highest mean score.
    - ``score`` of an expert, for the routers ``mlp``, ``oracle`` and ``constant``: the sum of its
      positive activations (``pos``, as published), of all without their sign (``abs``), the length
      of its output (``out``), or what it adds to the variance of the output, were its neurons
      independent (``var``).
    - ``mean_compensation``: experts that a token does not use contribute their mean output, not
      nothing.
    - ``activation``: the model's ``own``, or ``relu`` in its place, as the published method wants;
      a model that was not trained with it has to be trained again.
    - ``tokens``: about how many calibration tokens of a layer are looked at.
    - ``layers``: MLPs to convert, counted from 0; None: all.
    """

    macs_reduction: float | None = None
    active: float | None = None
    n_experts: int | None = None
    expert_size: int | None = None
    split: Split = "kmeans"
    router: Router = "mlp"
    score: Score = "pos"
    mean_compensation: bool = False
    activation: Activation = "own"
    tokens: int = 40_000
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            checks.one_of(name, getattr(self, name), get_args(choices))
        for one, other in (("macs_reduction", "active"), ("n_experts", "expert_size")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise MoeeError(f"{one} or {other}", "both", "give one of them")
        if self.macs_reduction is None and self.active is None:
            object.__setattr__(self, "macs_reduction", MACS_REDUCTION)
        for name, value in checks.not_none(self, "macs_reduction", "active"):
            checks.share(name, value, whole=name == "active")
        for name, value in checks.not_none(self, "n_experts", "expert_size"):
            checks.whole_number(name, value)
        checks.whole_number("tokens", self.tokens)
        checks.seed_number(self.seed)
        checks.layer_numbers(self.layers)

    def experts(self, site: MlpSite) -> int:
        """Number of experts of a layer.

        Raises ``MoeeError``: more experts than neurons.
        """
        if self.expert_size is not None:
            experts = round(site.hidden / self.expert_size)
        else:
            experts = self.n_experts or min(EXPERTS, max(1, site.hidden // SMALLEST))
        if not 1 <= experts <= site.hidden:
            raise MoeeError(
                f"1 to {site.hidden} experts for the {site.hidden} hidden neurons of {site.name}",
                str(experts), "choose another number or size",
            )  # fmt: skip
        return experts
