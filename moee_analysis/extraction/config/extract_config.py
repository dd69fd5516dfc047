"""What decides an extraction: recipe, budget, preset, clustering and seed."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from typing import Any, Literal

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.extraction.config.recipes import CHOICES, TOKEN_KINDS, recipe_named
from moee_analysis.utils.checks import (
    layer_numbers,
    not_none,
    one_of,
    seed_number,
    share,
    whole_number,
)

EXPERTS = ("clusters", "one")
NOISE_POLICIES = ("reroute", "drop", "rest")
VARIANCE_KEPT = 0.9  # p, where neither p nor a MACs budget is given
MACS_REDUCTION = 0.28  # of a global budget, where none is given


@dataclass(frozen=True)
class ExtractConfig:
    """How a model is taken apart; None follows from the preset or the recipe.

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
    - ``dense_tokens``: kinds of tokens among ``cls``, ``dist``, ``register`` and ``patch`` whose
      expert is the whole MLP, exactly: it keeps all neurons, so that a layer which they pass
      through stores all of its own. Leading tokens then have experts by kind, and an MLP that sees
      no other kinds stays dense. Not with the refit ``shared``, which changes the W2 of all
      experts; where the recipe has it, the refit is ``shift``.
    - ``unread``: patch tokens whose MLP output nothing reads are ``routed`` like others, or get a
      ``constant``.
    - ``order``: the neurons' scores: ``magnitude`` of their weights, ``variance``, variance
      ``weighted`` by the output weights, or ``obs``, elimination with the refit built in.
    - ``metric``: errors of the ``outputs`` count alike, or by the ``fisher`` information of the
      prediction.
    - ``coherence``: whether it is ``measured`` how much more the errors of an image's tokens cost
      together than one by one, layer by layer, or ``ignored``. Needs the ``fisher`` metric and a
      ``global`` budget; without effect elsewhere.
    - ``union``: neurons that no expert of a layer keeps go ``at_once``, or in ``steps``, and others
      are scored again in between. Without effect unless the parameters are bound.
    - ``thin``: layers whose experts would save hardly any MACs stay ``dense``, which is faster, and
      the others save the more; or are ``routed`` too.
    - ``refit``: what stands in for dropped neurons: ``none``, their mean (``shift``), a W2
      refitted for all experts (``shared``) or for ``each``.
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
    dense_tokens: tuple[str, ...] = ()
    unread: Literal["routed", "constant"] | None = None
    order: Literal["magnitude", "variance", "weighted", "obs"] | None = None
    metric: Literal["outputs", "fisher"] | None = None
    budget: Literal["share", "global"] | None = None
    coherence: Literal["ignored", "measured"] | None = None
    union: Literal["at_once", "steps"] | None = None
    thin: Literal["routed", "dense"] | None = None
    refit: Literal["none", "shift", "shared", "each"] | None = None
    attention: Literal["dense", "read", "low_rank"] | None = None

    def __post_init__(self) -> None:
        recipe_named(self.recipe)
        one_of("noise", self.noise, NOISE_POLICIES)
        one_of("experts", self.experts, EXPERTS)
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
        self._check_clustering()
        self._check_dense_tokens()
        self._check_budget()

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradients of the logits have to be recorded."""
        return self._piece("metric") == "fisher"

    def resolved(self) -> ExtractConfig:
        """Return the same configuration with all that preset and recipe decide filled in.

        ``tokens_per_image`` stays None, which means all tokens, where the recipe needs more of
        them than the preset's sample.
        """
        preset = preset_named(self.preset)
        pieces = {name: self._piece(name) for name in self._recipe}
        names = ["cluster_tokens", "calibration_images"]
        if not self._needs_all_tokens:
            names.append("tokens_per_image")
        sizes = {n: getattr(preset, n) for n in names if getattr(self, n) is None}
        return replace(self, **pieces, **sizes, **self._budgets())

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ExtractConfig:
        """Rebuild a configuration from ``dataclasses.asdict`` after a trip through JSON."""
        layers, clustering = content["layers"], content["clustering"]
        dense_tokens = content.get("dense_tokens", ())  # runs saved before it was a setting
        return cls(
            **{
                **content,
                "layers": None if layers is None else tuple(layers),
                "clustering": None if clustering is None else ClusterConfig(**clustering),
                "dense_tokens": tuple(dense_tokens),
            }
        )

    @property
    def measures_coherence(self) -> bool:
        """Whether the coherence of the layers is measured, and can have an effect."""
        pieces = ("coherence", "metric", "budget")
        return [self._piece(name) for name in pieces] == ["measured", "fisher", "global"]

    @property
    def narrows_unions(self) -> bool:
        """Whether the unions of neurons shrink in steps to a budget of parameters."""
        return self._piece("union") == "steps" and self.params_reduction is not None

    @property
    def _needs_all_tokens(self) -> bool:
        """Covariances of all hidden neurons take more tokens than variances do."""
        return self._piece("order") == "obs" or self._piece("refit") in ("shared", "each")

    @property
    def _recipe(self) -> dict[str, Any]:
        """The pieces of the recipe; tokens that are kept dense change two of them."""
        pieces = recipe_named(self.recipe, bound=self.params_reduction is not None)
        if self.dense_tokens:
            pieces["tokens"] = "kinds"
            pieces["refit"] = "shift" if pieces["refit"] == "shared" else pieces["refit"]
        return pieces

    def _piece(self, name: str) -> Any:
        given = getattr(self, name)
        return self._recipe[name] if given is None else given

    def _budgets(self) -> dict[str, float | None]:
        """The budget in force: what was given, or else a default."""
        if self._piece("budget") == "global":
            given = self.macs_reduction is not None or self.params_reduction is not None
            return {} if given else {"macs_reduction": MACS_REDUCTION}
        p = None if self.macs_reduction is not None else self.variance_kept or VARIANCE_KEPT
        return {"variance_kept": p}

    def _check_clustering(self) -> None:
        if not isinstance(self.clustering, ClusterConfig | None):
            raise MoeeError(
                "clustering as a ClusterConfig", reprlib.repr(self.clustering),
                "leave it out, or pass moee.ClusterConfig(...)",
            )  # fmt: skip

    def _check_dense_tokens(self) -> None:
        listed = isinstance(self.dense_tokens, (tuple, list))
        found = self.dense_tokens if listed else [self.dense_tokens]
        unknown = [kind for kind in found if not listed or kind not in TOKEN_KINDS]
        if unknown:
            raise MoeeError(
                f"dense_tokens as a tuple of kinds among {', '.join(TOKEN_KINDS)}",
                reprlib.repr(unknown[0]),
                'name them as in dense_tokens=("cls", "register")',
            )  # fmt: skip
        if self.dense_tokens and self.tokens == "alike":
            raise MoeeError(
                'dense_tokens with tokens="kinds"', 'tokens="alike"',
                "tokens of a kind that is kept dense need an expert of their own",
            )  # fmt: skip
        if self.dense_tokens and self.refit == "shared":
            raise MoeeError(
                "dense_tokens with a refit that leaves their W2 as it is (none, shift, each)",
                'refit="shared", one W2 for all experts', "choose another refit",
            )  # fmt: skip

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
        if self.params_reduction is not None and self._piece("refit") == "each":
            raise MoeeError(
                "params_reduction with a W2 that the experts share", 'refit="each"',
                "choose another refit, or bind only the MACs",
            )  # fmt: skip
