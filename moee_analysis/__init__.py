"""Take a trained vision network apart into a mixture of experts, and see what each part does.

Public names are imported when they are first used: what needs no network starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moee_analysis.utils.environment import prepare_caches, spare_cores

if TYPE_CHECKING:
    from moee_analysis import measure as measure
    from moee_analysis import plots as plots
    from moee_analysis.data.images import load_images as load_images
    from moee_analysis.errors import MoeeError as MoeeError
    from moee_analysis.extraction.config import ClusterConfig as ClusterConfig
    from moee_analysis.extraction.config import ExtractConfig as ExtractConfig
    from moee_analysis.extraction.pipeline import extract as extract
    from moee_analysis.extraction.record.token_source import Limits as Limits
    from moee_analysis.extraction.run import Extraction as Extraction
    from moee_analysis.extraction.run import load as load
    from moee_analysis.models.class_names import name_classes as name_classes
    from moee_analysis.models.loading import find_mlps as find_mlps
    from moee_analysis.models.loading import load_model as load_model
    from moee_analysis.models.survey import survey as survey
    from moee_analysis.moe.layer import set_dispatch as set_dispatch
    from moee_analysis.training.config import FinetuneConfig as FinetuneConfig
    from moee_analysis.training.finetune import Finetuned as Finetuned
    from moee_analysis.training.finetune import finetune as finetune
    from moee_analysis.training.finetune import history_of as history_of

_PUBLIC = {
    "data.images": ("load_images",),
    "errors": ("MoeeError",),
    "extraction.config": ("ClusterConfig", "ExtractConfig"),
    "extraction.pipeline": ("extract",),
    "extraction.record.token_source": ("Limits",),
    "extraction.run": ("Extraction", "load"),
    "models.class_names": ("name_classes",),
    "models.loading": ("find_mlps", "load_model"),
    "models.survey": ("survey",),
    "moe.layer": ("set_dispatch",),
    "training.finetune": ("Finetuned", "finetune", "history_of"),
    "training.config": ("FinetuneConfig",),
}
prepare_caches()
spare_cores()
_PLACES = {name: place for place, names in _PUBLIC.items() for name in names}
_MODULES = ("measure", "plots")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES, *_MODULES])
