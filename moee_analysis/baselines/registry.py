"""Every system that needs no training of the network, by name, asked for in the same words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moee_analysis.baselines import jetpack, moefication, soft_moe, sparse_upcycling, static_pruning
from moee_analysis.baselines.controls import oracle_routed
from moee_analysis.baselines.jetpack import JetpackConfig
from moee_analysis.baselines.soft_moe import SoftMoeConfig
from moee_analysis.baselines.sparse_upcycling import SparseUpcyclingConfig
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.loading import find_mlps

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
    told
        What it does, in a line.
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
    told: str
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


def _moee(told: str, **pieces: Any) -> System:
    def config(_dense: nn.Module, asked: Asked) -> ExtractConfig:
        return ExtractConfig(**vars(asked), **pieces)

    return System("MoEE", told, config, extract, oracle=oracle_routed)


def _static(told: str, baseline: str) -> System:
    def config(_dense: nn.Module, asked: Asked) -> static_pruning.StaticPruningConfig:
        return static_pruning.StaticPruningConfig(baseline, **vars(asked))

    return System("static pruning", told, config, static_pruning.convert, routed=False)


def _moefication(told: str, **settings: Any) -> System:
    def config(_dense: nn.Module, asked: Asked) -> moefication.MoeficationConfig:
        budget = {"macs_reduction": asked.macs_reduction, "seed": asked.seed}
        return moefication.MoeficationConfig(**budget, **settings)

    def oracle(model: nn.Module, _dense: nn.Module) -> nn.Module:
        return moefication.oracle_routed(model)

    return System("MoEfication", told, config, moefication.convert, oracle=oracle)


def _upcycled(family: str, told: str, baseline: Any, kind: type, **settings: Any) -> System:
    """Experts with weights of their own in all layers: half of them could not save so much."""

    def config(dense: nn.Module, asked: Asked) -> Any:
        layers = tuple(site.index for site in find_mlps(dense))
        budget = {"macs_reduction": asked.macs_reduction, "seed": asked.seed, "layers": layers}
        return kind(**budget | settings)

    return System(family, told, config, baseline.convert)


SYSTEMS: dict[str, System] = {
    "MoEE, paper": _moee("clusters of hidden activations, cosine router", recipe="paper"),
    "MoEE, best": _moee("all that this project found to help", recipe="best"),
    "MoEE, best, attention too": _moee(
        "the same, and smaller heads", recipe="best", attention="low_rank"
    ),
    "static: magnitude": _static("shortest weights first, without data", "magnitude"),
    "static: variance + mean shift": _static(
        "VBP: least variance first, means kept", "variance + mean shift"
    ),
    "static: least squares": _static(
        "least effect on the output, refitted", "output-weighted least squares"
    ),
    "static: fisher OBS, CLS apart": _static(
        "least effect on the logits, refitted; CLS has neurons of its own", "fisher OBS, CLS apart"
    ),
    "MoEfication: k-means, centre": _moefication(
        "similar neurons, nearest centre", split="kmeans", router="centre"
    ),
    "MoEfication: k-means, centre, means kept": _moefication(
        "the same, and unused experts give their mean", split="kmeans", router="centre",
        mean_compensation=True,
    ),
    "MoEfication: k-means, MLP, means kept": _moefication(
        "the same, with a router that learned which experts fire", split="kmeans", router="mlp",
        mean_compensation=True,
    ),
    "MoEfication: graph, MLP, means kept": _moefication(
        "the same, of neurons that are active together", split="graph", router="mlp",
        mean_compensation=True,
    ),
    "Sparse Upcycling: top-1": _upcycled(
        "Sparse Upcycling", "copies of every second MLP, one for each token", sparse_upcycling,
        SparseUpcyclingConfig, router="top_k", k=1, layers=None, macs_reduction=None,
    ),
    "Sparse Upcycling: Expert Choice": _upcycled(
        "Sparse Upcycling", "copies of the MLP that choose their tokens, untrained",
        sparse_upcycling, SparseUpcyclingConfig,
    ),
    "Soft MoE: upcycled": _upcycled(
        "Soft MoE", "copies of the MLP on mixtures of tokens, untrained", soft_moe, SoftMoeConfig
    ),
    "MoE Jetpack: recycled": _upcycled(
        "MoE Jetpack", "experts drawn by importance on mixtures of tokens, untrained", jetpack,
        JetpackConfig, head="recycled", core=4, universal=8,
    ),
}  # fmt: skip
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
