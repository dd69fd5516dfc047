"""What decides an extraction: recipe, budget, preset, clustering and seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moee_analysis.clustering import ClusterConfig, whole_number
from moee_analysis.errors import MoeeError
from moee_analysis.presets import preset_named

RECIPES = ("paper",)
EXPERTS = ("clusters", "one")
NOISE_POLICIES = ("reroute", "drop", "rest")
VARIANCE_KEPT = 0.9  # p, where neither p nor a MACs budget is given


@dataclass(frozen=True)
class ExtractConfig:
    """How a model is taken apart; None follows from the preset or the recipe.

    Give ``macs_reduction`` (share of the dense model's MACs to save) or ``variance_kept`` (the
    paper's p, as a share), not both.

    ``noise`` says what becomes of tokens in no cluster: ``reroute`` routes all tokens, by the
    mean inputs of the clusters, and takes the statistics of each expert as routed; ``drop``
    takes them from the cluster's own tokens; ``rest`` gives the noise an expert of its own.
    ``experts="one"`` is a control: a single expert per layer, that is, static pruning by the
    same rule, without clusters and without a router.
    """

    recipe: str = "paper"
    macs_reduction: float | None = None
    variance_kept: float | None = None
    preset: str = "small"
    seed: int = 0
    layers: tuple[int, ...] | None = None  # layers to convert, counted from 0; None: all
    tokens_per_image: int | None = None
    cluster_tokens: int | None = None
    calibration_images: int | None = None
    clustering: ClusterConfig = field(default_factory=ClusterConfig)
    noise: Literal["reroute", "drop", "rest"] = "reroute"
    experts: Literal["clusters", "one"] = "clusters"

    def __post_init__(self) -> None:
        for name, choices in (("recipe", RECIPES), ("noise", NOISE_POLICIES), ("experts", EXPERTS)):
            value = getattr(self, name)
            if value not in choices:
                raise MoeeError(f"{name} among {', '.join(choices)}", f"'{value}'", "name one")
        if self.macs_reduction is not None and self.variance_kept is not None:
            raise MoeeError("macs_reduction or variance_kept", "both", "give one of them")
        for name in ("macs_reduction", "variance_kept"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise MoeeError(f"{name} as a share in (0, 1]", str(value), "0.28 means 28 %")
        for name in ("tokens_per_image", "cluster_tokens", "calibration_images"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        whole_number("seed", self.seed, least=0)
        preset_named(self.preset)

    def resolved(self) -> ExtractConfig:
        """Return the same configuration with everything the preset decides filled in."""
        preset = preset_named(self.preset)
        names = ("tokens_per_image", "cluster_tokens", "calibration_images")
        missing = {n: getattr(preset, n) for n in names if getattr(self, n) is None}
        p = None if self.macs_reduction is not None else self.variance_kept or VARIANCE_KEPT
        return replace(self, **missing, variance_kept=p)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ExtractConfig:
        """Rebuild a configuration from ``dataclasses.asdict`` after a trip through JSON."""
        layers = content["layers"]
        return cls(
            **{
                **content,
                "layers": None if layers is None else tuple(layers),
                "clustering": ClusterConfig(**content["clustering"]),
            }
        )
