"""What decides an extraction: recipe, budget, preset, clustering and seed."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.extraction.config.recipes import recipe_named
from moee_analysis.utils.checks import (
    layer_numbers,
    not_none,
    one_of,
    seed_number,
    share,
    whole_number,
)

VARIANCE_KEPT = 0.9  # p, where neither p nor a MACs budget is given
MACS_REDUCTION = 0.28  # of a global budget, where none is given

REMOVED = {"dense_tokens": ((), []), "union": None, "thin": None}
REMOVED_CLUSTERING = {"metric": ("cosine",), "selection": ("eom",)}
"""Settings of earlier versions, and their values that a run may have; None: any."""


@dataclass(frozen=True)
class ExtractConfig:
    """How a model is converted; None follows from the preset or the recipe.

    The budget: ``macs_reduction`` and ``params_reduction`` are shares of the dense model's MACs
    and stored parameters to save; ``variance_kept`` is the paper's p, as a share. With
    ``budget="share"`` every expert keeps the same share of its scores (the paper), with
    ``"global"`` all layers, experts and neurons compete for one budget; only that can bind the
    parameters.

    ``noise`` says what becomes of tokens in no cluster: ``reroute`` routes all tokens, by the
    centres of the clusters, and takes the statistics of each expert as routed; ``drop``
    takes them from the cluster's own tokens; ``rest`` gives the noise an expert of its own.
    ``experts="one"`` is a control: a single expert per layer (beside those of leading tokens, if
    they have their own), that is, static pruning by the same rule, without clusters and without a
    router.

    The other pieces, each explained where it is computed:

    - ``router``: ``cosine`` to mean inputs, or ``nearest`` centre in the metric of the outputs
      (where ``clustering`` takes principal components of the inputs, in these).
    - ``tokens``: ``alike``, or each kind of leading token (CLS, distillation, registers) by its
      position to an expert of its own (``kinds``).
    - ``unread``: patch tokens whose MLP output nothing reads are ``routed`` like others, or get a
      ``constant``.
    - ``order``: the neurons' scores: ``magnitude`` of their weights, ``variance``, variance
      ``weighted`` by the output weights, or ``obs``, elimination with the refit built in.
    - ``metric``: errors of the ``outputs`` count alike, or by the ``fisher`` information of the
      prediction.
    - ``coherence``: whether it is ``measured`` how much more the errors of an image's tokens cost
      together than one by one, layer by layer, or ``ignored``. Needs the ``fisher`` metric and a
      ``global`` budget; without effect elsewhere.
    - ``refit``: what stands in for dropped neurons: ``none``, their mean (``shift``), or a W2
      refitted for all experts (``shared``).
    - ``attention``: ``dense``; asked only for tokens whose outputs are ``read``, which loses
      nothing; or ``low_rank`` too, heads having fewer dimensions by the budget of the neurons.
    """

    recipe: str = "paper"
    macs_reduction: float | None = None
    params_reduction: float | None = None
    variance_kept: float | None = None
    preset: str = "small"
    seed: int = 0
    layers: tuple[int, ...] | None = None  # MLPs to convert, counted from 0; None: all
    tokens_per_image: int | None = None
    cluster_tokens: int | None = None
    calibration_images: int | None = None
    clustering: ClusterConfig | None = None
    noise: Literal["reroute", "drop", "rest"] = "reroute"
    experts: Literal["clusters", "one"] = "clusters"
    router: Literal["cosine", "nearest"] | None = None
    tokens: Literal["alike", "kinds"] | None = None
    unread: Literal["routed", "constant"] | None = None
    order: Literal["magnitude", "variance", "weighted", "obs"] | None = None
    metric: Literal["outputs", "fisher"] | None = None
    budget: Literal["share", "global"] | None = None
    coherence: Literal["ignored", "measured"] | None = None
    refit: Literal["none", "shift", "shared"] | None = None
    attention: Literal["dense", "read", "low_rank"] | None = None

    def __post_init__(self) -> None:
        recipe_named(self.recipe)
        for name, value in not_none(self, *CHOICES):
            one_of(name, value, CHOICES[name])
        for name, value in not_none(self, "macs_reduction", "params_reduction", "variance_kept"):
            share(name, value)
        for name, value in not_none(
            self, "tokens_per_image", "cluster_tokens", "calibration_images"
        ):
            whole_number(name, value)
        seed_number(self.seed)
        layer_numbers(self.layers)
        preset_named(self.preset)
        if not isinstance(self.clustering, ClusterConfig | None):
            raise MoeeError(
                "clustering as a ClusterConfig", reprlib.repr(self.clustering),
                "leave it out, or pass moee.ClusterConfig(...)",
            )  # fmt: skip
        self._check_budget()

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the logits have to be recorded."""
        return self._piece("metric") == "fisher"

    @property
    def measures_coherence(self) -> bool:
        """Whether the coherence of the layers is measured, and can have an effect."""
        pieces = ("coherence", "metric", "budget")
        return [self._piece(name) for name in pieces] == ["measured", "fisher", "global"]

    def resolved(self) -> Self:
        """Return the same configuration with all that preset and recipe decide filled in.

        ``tokens_per_image`` stays None, which means all tokens, where the recipe needs more of
        them than the preset's sample.
        """
        preset = preset_named(self.preset)
        pieces = {name: self._piece(name) for name in self._recipe}
        names = ["cluster_tokens", "calibration_images"]
        if pieces["order"] != "obs" and pieces["refit"] != "shared":
            names.append("tokens_per_image")  # covariances of neurons take more tokens
        sizes = {n: getattr(preset, n) for n in names if getattr(self, n) is None}
        return replace(self, **pieces, **sizes, **self._budgets())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from ``dataclasses.asdict`` after a trip through JSON."""
        kept = _without(REMOVED, content)
        if kept["refit"] == "each":
            raise _removed("refit", "each")
        layers, clustering = kept["layers"], kept["clustering"]
        if clustering is not None:
            clustering = ClusterConfig(**_without(REMOVED_CLUSTERING, clustering))
        layers = None if layers is None else tuple(layers)
        return cls(**kept | {"layers": layers, "clustering": clustering})

    @property
    def _recipe(self) -> dict[str, Any]:
        return recipe_named(self.recipe, bound=self.params_reduction is not None)

    def _piece(self, name: str) -> Any:
        given = getattr(self, name)
        return self._recipe[name] if given is None else given

    def _budgets(self) -> dict[str, float | None]:
        """The budget in force: the given one, or else a default."""
        if self._piece("budget") == "global":
            given = self.macs_reduction is not None or self.params_reduction is not None
            return {} if given else {"macs_reduction": MACS_REDUCTION}
        p = None if self.macs_reduction is not None else self.variance_kept or VARIANCE_KEPT
        return {"variance_kept": p}

    def _check_budget(self) -> None:
        if self.macs_reduction is not None and self.variance_kept is not None:
            raise MoeeError("macs_reduction or variance_kept", "both", "give one of them")
        if self._piece("budget") == "global" and self.variance_kept is not None:
            raise MoeeError(
                'variance_kept with budget="share"', "a global budget", "give macs_reduction"
            )
        if self._piece("budget") == "share" and self.params_reduction is not None:
            raise MoeeError(
                'params_reduction with budget="global"', 'budget="share"', "bind only the MACs"
            )


def _without(removed: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that there still are; a removed one must have a value without effect."""
    for name, allowed in removed.items():
        if name in content and allowed is not None and content[name] not in allowed:
            raise _removed(name, content[name])
    return {name: value for name, value in content.items() if name not in removed}


def _removed(name: str, value: Any) -> MoeeError:
    return MoeeError(
        "settings that this version has", f"{name}={value!r}",
        "load the run with the version of this package that saved it, or extract again",
    )  # fmt: skip


def _choices(hint: Any) -> tuple[str, ...]:
    """The names in a Literal, optional or not; () for another type."""
    literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
    return get_args(literal)


CHOICES: dict[str, tuple[str, ...]] = {
    name: _choices(hint) for name, hint in get_type_hints(ExtractConfig).items() if _choices(hint)
}
"""The settings that are chosen by name, and their names."""
