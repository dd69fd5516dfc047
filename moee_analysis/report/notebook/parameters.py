"""The parameters every notebook takes, checked before anything is computed."""

from dataclasses import asdict, dataclass
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.utils.checks import not_none, seed_number, whole_number

LARGEST_SIZE = 10_000  # pixels or channels


@dataclass(frozen=True)
class Parameters:
    """The values of a notebook's parameters cell; creating one checks them all."""

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
        paths = not_none(self, "weights", "class_file", "calibration", "out")
        for name, value in [("model", self.model), ("images", self.images), *paths]:
            if not isinstance(value, str) or not value.strip():
                raise _refusal(name, "a text that is not empty", value)
        for name, value in not_none(self, "img_size", "in_chans"):
            whole_number(name, value, most=LARGEST_SIZE)
        for name in ("layers", "classes"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise _refusal(name, "a list", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for layer in self.layers:
            whole_number("layers", layer, least=0)
        if len(set(self.layers)) < len(self.layers):
            raise _refusal("layers", "numbers of layers, each once", self.layers)
        for each in self.classes:
            if not isinstance(each, str) or not each.strip():
                whole_number("classes", each, least=0)
        seed_number(self.seed)
        preset_named(self.preset)

    @property
    def deciding(self) -> dict[str, Any]:
        """The parameters that decide the results, as plain JSON values: all but ``out``."""
        values = {name: value for name, value in asdict(self).items() if name != "out"}
        return values | {"layers": list(self.layers), "classes": list(self.classes)}

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``load_model`` beside the name."""
        sizes = {"img_size": self.img_size, "in_chans": self.in_chans}
        return {"weights": self.weights, "classes": self.class_file, **sizes}


def _refusal(name: str, expected: str, found: Any) -> MoeeError:
    hint = f"correct '{name}' in the parameters cell, or where the report was started"
    return MoeeError(f"'{name}' as {expected}", f"{found!r} ({type(found).__name__})", hint)
