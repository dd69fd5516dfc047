"""What decides an extraction: recipe, budget, preset, clustering and seed."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from moee_analysis.errors import MoeeError
from moee_analysis.utils import checks
from moee_analysis.utils.checks import not_none

VARIANCE_KEPT = 0.9  # p, where neither p nor a MACs budget is given
MACS_REDUCTION = 0.28  # of a global budget, where none is given

REMOVED = {  # settings of earlier versions, and their values that a run may have; None: any
    "ExtractConfig": {"dense_tokens": ((), []), "union": None, "thin": None},
    "ClusterConfig": {"metric": ("cosine",), "selection": ("eom",)},
}


@dataclass(frozen=True)
class Preset:
    """The one dial of compute: how much of everything, unless given; None means all there is."""

    calibration_images: int | None
    evaluation_images: int | None
    tokens_per_image: int  # patch tokens sampled from each image, beside the prefix tokens
    cluster_tokens: int  # tokens clustered per layer; all sampled tokens enter the statistics
    resamples: int  # bootstrap resamples of the images
    permutations: int  # label permutations of a null distribution
    training_images: int  # to fine-tune with, of the bundled scenes


PRESETS: dict[str, Preset] = {
    "smoke": Preset(96, 60, 6, 500, 50, 20, 40),
    "small": Preset(1000, 1000, 16, 4000, 500, 200, 500),
    "full": Preset(None, None, 32, 20000, 2000, 1000, 8000),
}


def preset_named(name: str) -> Preset:
    """Return the preset called ``name``; a MoeeError lists the names there are."""
    checks.one_of("a preset", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True)
class ClusterConfig:
    """How the tokens of one layer are clustered.

    ``method`` is ``hdbscan``, which finds the number of clusters by itself, ``kmeans``, or
    ``random`` (the control: random tokens as centres). ``space`` is the ``hidden`` activations,
    or the ``inputs`` in the metric of the outputs. ``reduce="none"`` is the paper taken literally;
    on raw activations HDBSCAN calls most tokens noise, so the default reduces with UMAP first.
    """

    method: Literal["hdbscan", "kmeans", "random"] = "hdbscan"
    space: Literal["hidden", "inputs"] = "hidden"
    count: int | None = 32  # clusters of k-means, or random centres; None: see ``for_width``
    reduce: Literal["umap", "pca", "none"] = "umap"
    components: int | None = 8  # dimensions after the reduction; None: see ``for_width``
    neighbors: int = 30  # UMAP's neighbourhood
    epochs: int = 200  # UMAP's optimisation; its own default is 500 below 10,000 tokens
    min_samples: int = 10  # never left to hdbscan's default, which is min_cluster_size
    min_cluster_size: float = 0.01  # as a share of the clustered tokens
    max_cluster_size: float | None = 0.25  # likewise; None lets one cluster take everything
    max_noise: float = 0.8  # a layer with a larger share of noise stays dense

    def __post_init__(self) -> None:
        for name, choices in CLUSTER_CHOICES.items():
            checks.one_of(name, getattr(self, name), choices)
        checks.share("min_cluster_size", self.min_cluster_size)
        checks.share("max_noise", self.max_noise)
        for name, value in not_none(self, "max_cluster_size"):
            checks.real_number(name, value, least=self.min_cluster_size, most=1)
        for name, value in not_none(self, "count", "components"):
            checks.whole_number(name, value)
        checks.whole_number("epochs", self.epochs)
        checks.whole_number("min_samples", self.min_samples)
        checks.whole_number("neighbors", self.neighbors, least=2)  # UMAP counts the token itself

    def for_width(self, hidden: int) -> Self:
        """Fill in ``count`` and ``components``, if None, for a layer of ``hidden`` neurons.

        A cluster for every 12 neurons, so that routers and shifts are small beside the weights, and
        64 at most, so that experts have enough tokens; a component for every 48, mostly 12 inputs.
        """
        usual = {"count": min(max(hidden // 12, 2), 64), "components": max(hidden // 48, 2)}
        return replace(self, **usual | dict(not_none(self, *usual)))


CLUSTER_CHOICES = checks.choices_of(ClusterConfig)
# as many components and clusters as suit the width of a layer
_MEANS = ClusterConfig(method="kmeans", space="inputs", reduce="pca", components=None, count=None)

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {  # MoEE as published, nothing added
        "clustering": ClusterConfig(), "router": "cosine", "tokens": "alike",
        "unread": "routed", "order": "variance", "metric": "outputs", "budget": "share",
        "coherence": "ignored", "refit": "none", "attention": "dense", "merging": "none",
    },
    "best": {  # the best that this project has found
        "clustering": _MEANS, "router": "nearest", "tokens": "kinds",
        "unread": "constant", "order": "weighted", "metric": "fisher", "budget": "global",
        "coherence": "measured", "refit": "shared", "attention": "dense", "merging": "none",
    },
}  # fmt: skip
"""Each piece of an extraction, unless a configuration says otherwise; any can be switched alone."""

# Pieces that are others where parameters are bound: every expert has a router and a shift to store,
# and of neurons that go from all experts at once, the refit can make good the more.
BOUND = {"best": {"clustering": replace(_MEANS, count=16), "order": "obs"}}


def recipe_named(name: str, *, bound: bool = False) -> dict[str, Any]:
    """Return the pieces of the recipe called ``name``, with ``bound`` parameters or without."""
    checks.one_of("recipe", name, RECIPES)
    return RECIPES[name] | (BOUND.get(name, {}) if bound else {})


@dataclass(frozen=True)
class ExtractConfig:
    """How a model is converted; None follows from the preset or the recipe.

    The budget: ``macs_reduction`` and ``params_reduction`` are shares of the dense model's MACs
    and stored parameters to save; ``variance_kept`` is the paper's p. With ``budget="share"`` every
    expert keeps the same share of its scores (the paper), with ``"global"`` all layers, experts and
    neurons compete for one budget; only that can bind the parameters.

    ``noise`` says what becomes of tokens in no cluster: ``reroute`` routes all tokens by the
    clusters' centres, and takes the statistics of each expert as routed; ``drop`` takes them from
    the cluster's own tokens; ``rest`` gives the noise an expert. ``experts="one"`` is a control,
    static pruning by the same rule: one expert per layer, beside those of leading tokens.

    The other pieces, each explained where it is computed:

    - ``router``: ``cosine`` to mean inputs, or ``nearest`` centre in the metric of the outputs
      (where ``clustering`` takes principal components of the inputs, in these).
    - ``tokens``: ``alike``, or an expert for each of the ``kinds`` of leading tokens (CLS, ...).
    - ``unread``: patches whose MLP output nothing reads are ``routed``, or get a ``constant``.
    - ``order``: the neurons' scores: ``magnitude`` of their weights, ``variance``, variance
      ``weighted`` by the output weights, or ``obs``, elimination with the refit built in.
    - ``metric``: errors of ``outputs`` count alike, or by ``fisher`` information on predictions.
    - ``coherence``: how much more the errors of an image's tokens cost together than one by one is
      ``measured``, or ``ignored``; without effect but on the ``fisher`` metric and a global budget.
    - ``refit`` of dropped neurons: ``none``, their mean (``shift``), or one new W2 (``shared``).
    - ``attention``: ``dense``; asked only for tokens whose outputs are ``read``, which loses
      nothing; or ``low_rank`` too, heads having fewer dimensions by the budget of the neurons.
    - ``merging`` of patches that are alike: ``none``, or a part of the ``budget`` of MACs.

    With ``budget_in="time"`` it is a share of the dense model's time that ``macs_reduction`` saves:
    of a batch of ``for_batch`` images on this machine, as measured once. A layer is routed, pruned
    for all tokens alike or left dense then, whichever loses least.
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
    merging: Literal["none", "budget"] | None = None
    merges: tuple[int, ...] | None = None  # of an image's tokens in each block; None: searched
    budget_in: Literal["macs", "time"] = "macs"
    for_batch: int = 64

    def __post_init__(self) -> None:
        recipe_named(self.recipe)
        for name, value in not_none(self, *CHOICES):
            checks.one_of(name, value, CHOICES[name])
        for name, value in not_none(self, "macs_reduction", "params_reduction", "variance_kept"):
            checks.share(name, value)
        checks.whole_number("for_batch", self.for_batch)
        counts = "tokens_per_image", "cluster_tokens", "calibration_images"
        for name, value in not_none(self, *counts):
            checks.whole_number(name, value)
        checks.seed_number(self.seed)
        checks.layer_numbers(self.layers)
        preset_named(self.preset)
        if not isinstance(self.clustering, ClusterConfig | None):
            hint = "leave it out, or pass moee.ClusterConfig(...)"
            raise MoeeError("clustering as a ClusterConfig", reprlib.repr(self.clustering), hint)
        if self.variance_kept is not None and self.macs_reduction is not None:
            raise MoeeError("macs_reduction or variance_kept", "both", "give one of them")
        budget = self._pieces["budget"]
        if self.variance_kept is not None and budget == "global":
            expected = 'variance_kept with budget="share"'
            raise MoeeError(expected, "a global budget", "give macs_reduction")
        if self.params_reduction is not None and budget == "share":
            expected = "params_reduction with one budget for all layers"
            found, hint = "a share of each layer, as in paper", "take best, or bind only the MACs"
            raise MoeeError(expected, found, hint)
        if self.budget_in == "time" and (budget == "share" or self.params_reduction is not None):
            expected = 'budget_in="time" with a global budget of nothing else'
            bound = (
                "a share of each layer, as in paper" if budget == "share" else "params_reduction"
            )
            raise MoeeError(expected, bound, "take best, and give macs_reduction alone")
        self._check_merging()

    def _check_merging(self) -> None:
        merging, budget = self._pieces["merging"], self._pieces["budget"]
        for number in self.merges or ():
            checks.whole_number("merges", number, least=0)
        if merging == "none" and self.merges is not None:
            hint = "say so, or leave the merges out"
            raise MoeeError('merges with merging="budget"', 'merging="none"', hint)
        # a global budget has a number of MACs where no other is given
        free = budget == "share" or self.params_reduction is not None
        if merging == "budget" and free and self.macs_reduction is None and self.merges is None:
            hint = "give it, or the merges of each block"
            raise MoeeError('macs_reduction with merging="budget"', "none", hint)

    @property
    def _pieces(self) -> dict[str, Any]:
        """The recipe, and what is given in its place."""
        recipe = recipe_named(self.recipe, bound=self.params_reduction is not None)
        return recipe | dict(not_none(self, *recipe))

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the logits have to be recorded."""
        return self._pieces["metric"] == "fisher"

    @property
    def measures_coherence(self) -> bool:
        """Whether the coherence of the layers is measured, and can have an effect."""
        wanted = {"coherence": "measured", "metric": "fisher", "budget": "global"}
        return wanted.items() <= self._pieces.items()

    def resolved(self) -> Self:
        """Return the same configuration with all that preset and recipe decide filled in."""
        preset, pieces = preset_named(self.preset), self._pieces
        names = ["cluster_tokens", "calibration_images"]
        if pieces["order"] != "obs" and pieces["refit"] != "shared":
            names.append("tokens_per_image")  # covariances of neurons take more tokens
        usual = {name: getattr(preset, name) for name in names}
        if self.macs_reduction is None and self.params_reduction is None:
            share_kept, saved = {"variance_kept": VARIANCE_KEPT}, {"macs_reduction": MACS_REDUCTION}
            usual |= saved if pieces["budget"] == "global" else share_kept
        return replace(self, **pieces, **usual | dict(not_none(self, *usual)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from ``dataclasses.asdict`` after a trip through JSON."""
        kept = _without("ExtractConfig", content)
        if kept["refit"] == "each":
            raise _removed("refit", "each")
        if kept["clustering"] is not None:
            kept["clustering"] = ClusterConfig(**_without("ClusterConfig", kept["clustering"]))
        for name in ("layers", "merges"):
            if kept.get(name) is not None:
                kept[name] = tuple(kept[name])
        return cls(**kept)


CHOICES = checks.choices_of(ExtractConfig)  # settings that are chosen by name, and their names


def _without(settings: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that there still are; a removed one must have a value without effect."""
    for name, allowed in REMOVED[settings].items():
        if name in content and allowed is not None and content[name] not in allowed:
            raise _removed(name, content[name])
    return {name: value for name, value in content.items() if name not in REMOVED[settings]}


def _removed(name: str, value: Any) -> MoeeError:
    hint = "load the run with the version of this package that saved it, or extract again"
    return MoeeError("settings that this version has", f"{name}={value!r}", hint)
