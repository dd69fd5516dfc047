"""Every system that needs no training of the network, by name, asked for in the same words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moee_analysis.baselines import (
    jetpack,
    moefication,
    soft_moe,
    sparse_upcycling,
    static_pruning,
    token_merging,
)
from moee_analysis.baselines.common.exchange import Store
from moee_analysis.baselines.controls import oracle_routed
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.loading import find_mlps

STATIC_PRUNING = "static pruning"  # the family


@dataclass(frozen=True)
class Asked:
    """What a system is asked for: its share of all MACs to save, how much compute, which seed."""

    macs_reduction: float = 0.28
    preset: str = "small"
    seed: int = 0


@dataclass(frozen=True)
class System:
    """A way from a dense model and calibration images to another model.

    - ``family``: whose idea it is; ``told``: what it does, in a line.
    - ``convert``: dense model, images, configuration and ``store=`` -> model, or an `Extraction`.
    - ``kind``: of configuration; ``settings``: of it, beside what is asked.
    - ``everywhere``: whether all MLPs are converted, also where the system leaves some out.
    - ``routed``: whether there are experts to choose from.
    - ``oracle``: converted and dense model -> a copy whose tokens all meet the experts that the
      system holds for the best; None: it does not say.
    """

    family: str
    told: str
    convert: Callable[..., Extraction | nn.Module]
    kind: type
    settings: Mapping[str, Any]
    everywhere: bool = False
    routed: bool = True
    oracle: Callable[[nn.Module, nn.Module], nn.Module] | None = None

    @property
    def prunes(self) -> bool:
        """Whether it is static pruning, which all others are compared with."""
        return self.family == STATIC_PRUNING

    def make(
        self, dense: nn.Module, images: ImageSet, asked: Asked, *, store: Store = None
    ) -> Extraction | nn.Module:
        """Convert ``dense`` with calibration ``images`` to what is ``asked``, if it knows it.

        Raises ``MoeeError``: the system cannot save so much, or cannot convert such a model.
        """
        own = {name: v for name, v in vars(asked).items() if name in self.kind.__dataclass_fields__}
        if self.everywhere:
            own["layers"] = tuple(site.index for site in find_mlps(dense))
        return self.convert(dense, images, self.kind(**own | self.settings), store=store)


def _family(family: str, convert: Callable, kind: type, **facts: Any) -> Callable[..., System]:
    """What makes systems of a family, of a line about each and its settings by name."""
    return lambda told, *, everywhere=False, **settings: System(
        family, told, convert, kind, settings, everywhere=everywhere, **facts
    )


_moee = _family("MoEE", extract, ExtractConfig, oracle=oracle_routed)
_static = _family(
    STATIC_PRUNING, static_pruning.convert, static_pruning.StaticPruningConfig, routed=False
)
_moefied = _family(
    "MoEfication", moefication.convert, moefication.MoeficationConfig,
    oracle=lambda model, _dense: moefication.oracle_routed(model),
)  # fmt: skip
_sparse = _family(
    "Sparse Upcycling", sparse_upcycling.convert, sparse_upcycling.SparseUpcyclingConfig
)
_soft = _family("Soft MoE", soft_moe.convert, soft_moe.SoftMoeConfig)
_jetpack = _family("MoE Jetpack", jetpack.convert, jetpack.JetpackConfig)
_merged = _family(
    "token merging", token_merging.convert, token_merging.TokenMergingConfig, routed=False
)

SYSTEMS: dict[str, System] = {
    "MoEE, paper": _moee("clusters of hidden activations, cosine router", recipe="paper"),
    "MoEE, best": _moee("all that this project found to help", recipe="best"),
    "MoEE, best, attention too": _moee(
        "the same, and smaller heads", recipe="best", attention="low_rank"
    ),
    "MoEE, best, all three": _moee(
        "the same, and tokens that merge first", recipe="best", attention="low_rank",
        merging="budget",
    ),
    "static: magnitude": _static("shortest weights first, without data", baseline="magnitude"),
    "static: variance + mean shift": _static(
        "VBP: least variance first, means kept", baseline="variance + mean shift"
    ),
    "static: least squares": _static(
        "least effect on the output, refitted", baseline="output-weighted least squares"
    ),
    "static: fisher OBS, CLS apart": _static(
        "least effect on the logits, refitted; CLS has neurons of its own",
        baseline="fisher OBS, CLS apart",
    ),
    "ToMe": _merged("tokens with similar keys become one, as many in every block"),
    "ToMe, class importance": _merged(
        "the same, weighted by the attention of CLS", weights="importance"
    ),
    "MoEfication: k-means, centre": _moefied("similar neurons, nearest centre", router="centre"),
    "MoEfication: k-means, centre, means kept": _moefied(
        "the same, and unused experts give their mean", router="centre", mean_compensation=True
    ),
    "MoEfication: k-means, MLP, means kept": _moefied(
        "the same, with a router that learned which experts fire", mean_compensation=True
    ),
    "MoEfication: graph, MLP, means kept": _moefied(
        "the same, of neurons that are active together", split="graph", mean_compensation=True
    ),
    "Sparse Upcycling: top-1": _sparse(  # it cannot save any MACs
        "copies of every second MLP, one for each token", router="top_k", k=1, macs_reduction=None
    ),
    "Sparse Upcycling: Expert Choice": _sparse(
        "copies of the MLP that choose their tokens, untrained", everywhere=True
    ),
    "Soft MoE: upcycled": _soft(
        "copies of the MLP on mixtures of tokens, untrained", everywhere=True
    ),
    "MoE Jetpack: recycled": _jetpack(
        "experts drawn by importance on mixtures of tokens, untrained", everywhere=True,
        head="recycled", core=4, universal=8,
    ),
}  # fmt: skip
"""All systems. Those that were made to be trained are shown as they begin."""

STATIC = "static: fisher OBS, CLS apart"
"""What every other system has to beat at the same MACs, where no other static one is compared."""


def systems_named(names: list[str] | None) -> dict[str, System]:
    """Return the systems called so, in the order of :data:`SYSTEMS`; None: all of them.

    Raises ``MoeeError``: no system of this name.
    """
    unknown = sorted(set(names or ()) - set(SYSTEMS))
    if unknown:
        raise MoeeError(f"systems among {'; '.join(SYSTEMS)}", f"'{unknown[0]}'", "name others")
    return {n: system for n, system in SYSTEMS.items() if names is None or n in names}
