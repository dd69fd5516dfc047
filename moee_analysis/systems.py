"""Every system that needs no training of the network, by name, asked for in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moee_analysis.config import ExtractConfig
from moee_analysis.controls import oracle_routed
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import Extraction, extract
from moee_analysis.models import find_mlps
from moee_analysis.rivals import jetpack, moefication, soft_moe, sparse_upcycling, static_pruning

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from moee_analysis.images import ImageSet

    Oracle = Callable[[nn.Module, nn.Module], nn.Module]


@dataclass(frozen=True)
class Asked:
    """What a system is asked for: its share of all MACs to save, how much compute, which seed."""

    macs_reduction: float = 0.28
    preset: str = "small"
    seed: int = 0


@dataclass(frozen=True)
class System:
    """A way from a dense model and calibration images to another model.

    Attributes
    ----------
    family
        Whose idea it is.
    config
        Dense model and what is asked -> configuration.
    convert
        Dense model, images, configuration and ``store=`` -> model, or :class:`Extraction`.
    routed
        Whether there are experts to choose from.
    oracle
        Converted and dense model -> a copy whose tokens all meet the best experts, as the system
        understands it; None: it does not say what is best.
    """

    family: str
    config: Callable[[nn.Module, Asked], Any]
    convert: Callable[..., Extraction | nn.Module]
    routed: bool = True
    oracle: Oracle | None = None

    def make(
        self, dense: nn.Module, images: ImageSet, asked: Asked, *, store: str | Path | None = None
    ) -> Extraction | nn.Module:
        """Convert ``dense`` with these calibration ``images``.

        Raises
        ------
        MoeeError
            The system cannot save so much, or cannot convert such a model.
        """
        return self.convert(dense, images, self.config(dense, asked), store=store)


def _moee(recipe: str, **others: Any) -> System:
    def config(_dense: nn.Module, asked: Asked) -> ExtractConfig:
        return ExtractConfig(recipe=recipe, **vars(asked), **others)

    return System("MoEE", config, extract, oracle=oracle_routed)


def _static(baseline: str) -> System:
    def config(_dense: nn.Module, asked: Asked) -> static_pruning.StaticPruningConfig:
        return static_pruning.StaticPruningConfig(baseline, **vars(asked))

    return System("static pruning", config, static_pruning.convert, routed=False)


def _moefied(**settings: Any) -> System:
    def config(_dense: nn.Module, asked: Asked) -> moefication.MoeficationConfig:
        budget = {"macs_reduction": asked.macs_reduction, "seed": asked.seed}
        return moefication.MoeficationConfig(**budget, **settings)

    return System("MoEfication", config, moefication.convert, oracle=None)


def _upcycled(**settings: Any) -> System:
    def config(dense: nn.Module, asked: Asked) -> sparse_upcycling.SparseUpcyclingConfig:
        budget = {"macs_reduction": asked.macs_reduction, "layers": _all_layers(dense)}
        own = budget if settings["router"] == "expert_choice" else {}
        return sparse_upcycling.SparseUpcyclingConfig(seed=asked.seed, **own, **settings)

    return System("Sparse Upcycling", config, sparse_upcycling.convert)


def _soft(dense: nn.Module, asked: Asked) -> soft_moe.SoftMoeConfig:
    budget = {"macs_reduction": asked.macs_reduction, "layers": _all_layers(dense)}
    return soft_moe.SoftMoeConfig(experts=8, seed=asked.seed, **budget)


def _jetpack(dense: nn.Module, asked: Asked) -> jetpack.JetpackConfig:
    budget = {"macs_reduction": asked.macs_reduction, "layers": _all_layers(dense)}
    return jetpack.JetpackConfig(
        core=4, universal=8, head="recycled", seed=asked.seed, **budget
    )  # fmt: skip


def _all_layers(dense: nn.Module) -> tuple[int, ...]:
    """All MLPs: half of them, as published, could not save so much."""
    return tuple(site.index for site in find_mlps(dense))


SYSTEMS: dict[str, System] = {
    "MoEE, paper": _moee("paper"),
    "MoEE, best": _moee("best"),
    "MoEE, best, attention too": _moee("best", attention="low_rank"),
    "static: magnitude": _static("magnitude"),
    "static: variance + mean shift": _static("variance + mean shift"),
    "static: output-weighted least squares": _static("output-weighted least squares"),
    "static: fisher OBS, CLS apart": _static("fisher OBS, CLS apart"),
    "MoEfication: k-means, centre": _moefied(split="kmeans", router="centre"),
    "Sparse Upcycling: top-1": _upcycled(experts=8, router="top_k", k=1),
    "Sparse Upcycling: Expert Choice": _upcycled(experts=8, router="expert_choice"),
    "Soft MoE, upcycled": System("Soft MoE", _soft, soft_moe.convert),
    "MoE Jetpack, recycled": System("MoE Jetpack", _jetpack, jetpack.convert),
}
"""All systems. Those that were made to be trained are shown as they begin."""

STATIC = "static: fisher OBS, CLS apart"
"""What every other system has to beat at the same MACs, where no other static one is compared."""


def systems_named(names: list[str] | None) -> dict[str, System]:
    """Return the systems called so, in the order of :data:`SYSTEMS`; None: all of them.

    Raises
    ------
    MoeeError
        No system of this name.
    """
    unknown = sorted(set(names or ()) - set(SYSTEMS))
    if unknown:
        raise MoeeError(f"systems among {'; '.join(SYSTEMS)}", f"'{unknown[0]}'", "name others")
    return {n: system for n, system in SYSTEMS.items() if names is None or n in names}
