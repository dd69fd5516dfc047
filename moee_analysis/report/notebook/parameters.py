"""What a notebook is given: parameters, checked before anything is computed, and their images."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from moee_analysis.data.disjoint import check_disjoint, without_repeats
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.models.loading import BUNDLED, BUNDLED_MODELS
from moee_analysis.utils.checks import layer_numbers, not_none, seed_number, whole_number

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
        layer_numbers(self.layers)
        for each in self.classes:
            if not isinstance(each, str) or not each.strip():
                whole_number("classes", each, least=0)
        for name, values in (("layers", self.layers), ("classes", self.classes)):
            if len(set(values)) < len(values):
                raise _refusal(name, f"{name}, each once", values)
        seed_number(self.seed)
        preset_named(self.preset)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``load_model`` beside the name."""
        sizes = {"img_size": self.img_size, "in_chans": self.in_chans}
        return {"weights": self.weights, "classes": self.class_file, **sizes}


def _refusal(name: str, expected: str, found: Any) -> MoeeError:
    hint = f"correct '{name}' in the parameters cell, or where the report was started"
    return MoeeError(f"'{name}' as {expected}", f"{found!r} ({type(found).__name__})", hint)


@dataclass(frozen=True)
class ImageSets:
    """Images for making the experts, others for looking at them, for fine-tuning, and remarks."""

    calibration: ImageSet
    evaluation: ImageSet
    training: ImageSet
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Names and sizes of both sets, for ``results.json``."""
        return {"calibration": _facts(self.calibration), "evaluation": _facts(self.evaluation)}


def _facts(images: ImageSet) -> dict[str, Any]:
    facts = {"name": images.name, "count": len(images), "classes": len(set(images.folders))}
    return facts | {"skipped": list(images.skipped)}


def choose_images(given: Parameters) -> ImageSets:
    """Load the two sets that the parameters ask for, in the sizes of their preset.

    Without a ``calibration`` folder the bundled set serves, if the model or the images are
    bundled; otherwise a part of ``images`` is set aside. No picture may be in both.
    """
    ours = given.model in BUNDLED_MODELS or given.images == BUNDLED
    source = given.calibration or (BUNDLED if ours else None)
    if source is None:
        return _set_aside(given)
    if source == given.images != BUNDLED:
        hint = "leave 'calibration' empty: a part of 'images' is then set aside"
        raise MoeeError("'calibration' and 'images' in two folders", f"'{source}' for both", hint)
    sizes, load = preset_named(given.preset), partial(load_images, seed=given.seed)
    calibration = load(source, split="calibration", limit=sizes.calibration_images)
    evaluation = load(given.images, limit=sizes.evaluation_images)
    if {source, given.images} != {BUNDLED}:
        check_disjoint(calibration, evaluation, use="used for calibration")
    training = calibration
    if source == BUNDLED:
        training = load(source, split="train", limit=sizes.training_images)
    notes = (*_skipped(calibration), *_skipped(evaluation))
    return ImageSets(calibration, evaluation, training, notes)


def _set_aside(given: Parameters) -> ImageSets:
    """Both sets from the one folder ``images``, half of it each."""
    sizes, seed = preset_named(given.preset), given.seed
    limits = (sizes.calibration_images, sizes.evaluation_images)
    total = None if None in limits else 2 * max(limits)
    found = load_images(given.images, limit=total, seed=seed)
    images = without_repeats(found)
    if len(images) < 2:
        expected = "at least two images, for calibration and for evaluation"
        hint = "add images, or name a 'calibration' folder"
        raise MoeeError(expected, str(len(images)), hint)
    calibration, evaluation = images.split(0.5, seed=seed)
    notes = [
        f"No calibration set was given: {len(calibration)} of the {len(images)} images of "
        f"{images.name} were set aside for calibration and are never evaluated."
    ]
    if len(images) < len(found):
        notes.append(f"{len(found) - len(images)} images are there twice and count once.")
    calibration = calibration.limit(limits[0], seed=seed)
    evaluation = evaluation.limit(limits[1], seed=seed)
    return ImageSets(calibration, evaluation, calibration, (*notes, *_skipped(images)))


def _skipped(images: ImageSet) -> tuple[str, ...]:
    return (f"Skipped of {images.name}: {images.skipped_text}.",) if images.skipped else ()
