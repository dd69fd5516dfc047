"""Static pruning without training: every layer keeps the same neurons for all of its tokens.

The named baselines span what is published, by the pieces that also make mixtures of experts:
magnitudes of the weights, without data; VBP ("Variance-Based Pruning", Berisha et al., ICCV 2025);
least squares with output-weighted variances, as OB2C (2026), but without its denoised variances;
then what the Fisher metric adds. All give the patches that nothing reads a constant, so that they
save there what the best mixture of experts saves.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from moee_analysis.baselines.common.exchange import Store
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.macs import count_parameters
from moee_analysis.utils.checks import share

_STATIC = {
    "experts": "one", "tokens": "alike", "unread": "constant", "coherence": "ignored",
    "attention": "dense", "budget": "global", "metric": "outputs", "merging": "none",
}  # fmt: skip
_LEAST_SQUARES = _STATIC | {"order": "weighted", "refit": "shared"}
_OBS = _LEAST_SQUARES | {"order": "obs", "metric": "fisher", "coherence": "measured"}

BASELINES: dict[str, dict[str, Any]] = {
    "magnitude": _STATIC | {"order": "magnitude", "budget": "share", "refit": "none"},
    "variance + mean shift": _STATIC | {"order": "variance", "refit": "shift"},
    "output-weighted least squares": _LEAST_SQUARES,
    "fisher least squares": _LEAST_SQUARES | {"metric": "fisher"},
    "fisher OBS": _OBS,
    "fisher OBS, CLS apart": _OBS | {"tokens": "kinds"},
    "fisher OBS, attention too": _OBS | {"tokens": "kinds", "attention": "low_rank"},
}
"""Settings of ``ExtractConfig`` by name.

Magnitudes of different layers compare badly, so every layer keeps the same share of its own. VBP
ranks the raw variances of all layers together, and so does its baseline here. ``CLS apart`` lets
the leading tokens keep other neurons than the patches, by position; ``attention too`` does so as
well, and cuts heads down to the modes that ``attention_modes`` finds.
"""


@dataclass(frozen=True)
class StaticPruningConfig:
    """How a model is pruned: by which of :data:`BASELINES`, and the rest as in :func:`prune`.

    Raises ``MoeeError``: no such baseline; a setting out of its range.
    """

    baseline: str = "fisher OBS, CLS apart"
    macs_reduction: float = 0.28
    params_reduction: float | None = None
    preset: str = "small"
    seed: int = 0

    def __post_init__(self) -> None:
        share("macs_reduction", self.macs_reduction)
        config_of(**vars(self))


def convert(
    dense: nn.Module, images: ImageSet, config: StaticPruningConfig, *, store: Store = None
) -> nn.Module:
    """Prune the MLPs of ``dense`` as :func:`prune` does, and return the model alone."""
    return prune(dense, images, **vars(config), store=store).model


def prune(
    model: nn.Module, images: ImageSet, baseline: str, *, store: Store = None, **settings: Any
) -> Extraction:
    """Prune the MLPs of ``model``; labels of the calibration ``images`` are not used.

    ``settings`` are more of ``ExtractConfig``: ``macs_reduction`` and ``params_reduction``, shares
    of the dense model's MACs and stored parameters to save, ``preset`` and ``seed``.

    Raises ``MoeeError``: no such baseline; a budget that cannot be met.
    """
    run = extract(model, images, config_of(baseline, **settings), store=store)
    saved = 1 - count_parameters(run.model) / count_parameters(model)
    asked = settings.get("params_reduction")
    if asked is not None and saved < asked:
        raise MoeeError(
            f"a parameters reduction of {asked:.1%}",
            f"{saved:.1%} at a MACs reduction of {settings['macs_reduction']:.1%}",
            "ask for more MACs, or choose a baseline with a global budget",
        )
    return run


def config_of(
    baseline: str, *, macs_reduction: float, params_reduction: float | None = None, **others: Any
) -> ExtractConfig:
    """Configuration of the ``baseline`` called so; ``others`` are more of its settings.

    Where each layer keeps a share, the parameters cannot be bound; they fall with the MACs.

    Raises ``MoeeError``: no such baseline; a setting out of its range.
    """
    if baseline not in BASELINES:
        raise MoeeError(f"a baseline among {'; '.join(BASELINES)}", f"'{baseline}'", "name one")
    pieces = BASELINES[baseline]
    bound = params_reduction if pieces["budget"] == "global" else None
    budget = {"macs_reduction": macs_reduction, "params_reduction": bound}
    return ExtractConfig(**pieces | budget | others)
