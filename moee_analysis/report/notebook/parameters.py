"""The parameters every notebook takes, checked before anything is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.presets import preset_named

SEEDS = 2**32
LARGEST_SIZE = 10_000  # pixels or channels


@dataclass(frozen=True)
class Parameters:
    """The values of a notebook's parameters cell; creating one checks them all.

    Raises
    ------
    MoeeError
        A value of the wrong type or out of range; the message names the parameter.
    """

    model: str = "bundled"
    weights: str | None = None
    img_size: int | None = None
    in_chans: int | None = None
    class_file: str | None = None
    calibration: str | None = None
    images: str = "bundled"
    layers: tuple[int, ...] = ()
    classes: tuple[int | str, ...] = ()
    preset: str = "small"
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "images", "preset"):
            _require(name, getattr(self, name), "a text that is not empty", _is_text)
        for name in ("weights", "class_file", "calibration", "out"):
            _require(name, getattr(self, name), "a path as text, or None", _is_text_or_none)
        for name in ("img_size", "in_chans"):
            _require(name, getattr(self, name), "a whole number from 1, or None", _is_size_or_none)
        _require("layers", self.layers, "a list of layers counted from 0, each once", _are_layers)
        _require("classes", self.classes, "a list of class names or indices", _are_classes)
        _require("seed", self.seed, f"a whole number from 0 to {SEEDS - 1}", _is_seed)
        preset_named(self.preset)
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "classes", tuple(self.classes))

    def told(self) -> dict[str, Any]:
        """What decides the results, as plain JSON values: all but ``out``."""
        values = asdict(self)
        del values["out"]
        return values | {"layers": list(self.layers), "classes": list(self.classes)}


def _require(name: str, value: Any, expected: str, holds: Any) -> None:
    if not holds(value):
        raise MoeeError(
            f"{expected}, as '{name}'",
            f"{value!r} ({type(value).__name__})",
            f"correct '{name}' in the parameters cell, or where the report was started",
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size_or_none(value: Any) -> bool:
    return value is None or (_is_count(value) and 0 < value <= LARGEST_SIZE)


def _is_seed(value: Any) -> bool:
    return _is_count(value) and value < SEEDS


def _are_layers(values: Any) -> bool:
    listed = isinstance(values, (list, tuple)) and all(_is_count(v) for v in values)
    return listed and len(set(values)) == len(values)


def _are_classes(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(_is_text(v) or _is_count(v) for v in values)
