"""Take a trained vision network apart into a mixture of experts, and see what each part does.

Public names are imported when they are first used: what needs no network starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moee_analysis.caches import prepare_caches

if TYPE_CHECKING:
    from moee_analysis import measure as measure
    from moee_analysis import plots as plots
    from moee_analysis.calibration import Limits as Limits
    from moee_analysis.classes import name_classes as name_classes
    from moee_analysis.clustering import ClusterConfig as ClusterConfig
    from moee_analysis.config import ExtractConfig as ExtractConfig
    from moee_analysis.errors import MoeeError as MoeeError
    from moee_analysis.extraction import Extraction as Extraction
    from moee_analysis.extraction import extract as extract
    from moee_analysis.extraction import load as load
    from moee_analysis.finetune_config import FinetuneConfig as FinetuneConfig
    from moee_analysis.finetuning import Finetuned as Finetuned
    from moee_analysis.finetuning import finetune as finetune
    from moee_analysis.finetuning import history_of as history_of
    from moee_analysis.images import load_images as load_images
    from moee_analysis.layers import set_dispatch as set_dispatch
    from moee_analysis.mlp_survey import survey as survey
    from moee_analysis.models import find_mlps as find_mlps
    from moee_analysis.models import load_model as load_model

_PUBLIC = {
    "calibration": ("Limits",),
    "classes": ("name_classes",),
    "clustering": ("ClusterConfig",),
    "config": ("ExtractConfig",),
    "errors": ("MoeeError",),
    "extraction": ("Extraction", "extract", "load"),
    "finetune_config": ("FinetuneConfig",),
    "finetuning": ("Finetuned", "finetune", "history_of"),
    "images": ("load_images",),
    "layers": ("set_dispatch",),
    "mlp_survey": ("survey",),
    "models": ("find_mlps", "load_model"),
}
prepare_caches()
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
