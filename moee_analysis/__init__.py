"""Take a trained vision network apart into a mixture of experts, and see what each part does.

Public names stand in ``__init__.pyi``, and are imported when they are first used: what needs no
network starts at once.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from moee_analysis.utils.environment import prepare_caches, spare_cores

prepare_caches()
spare_cores()
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_PLACES = {name: place for place, name in re.findall(r"^from (\S+) import (\w+)", _STUB, re.M)}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if _PLACES[name] == __name__:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
