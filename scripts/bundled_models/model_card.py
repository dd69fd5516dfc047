"""The card of a bundled model: how good it is, how it came about; and both files on disk."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from moee_analysis.data.scenes.canvas import SIDE
from moee_analysis.data.scenes.scene import CLASSES, SPLIT_SEEDS
from moee_analysis.utils.storage.files import new_file, write_text
from scripts.bundled_models.architectures import ARCHITECTURES, Recipe
from scripts.bundled_models.evaluation import Pictures, half_pruned, per_class, top1

SPLITS = ("train", "evaluation", "calibration")


def accuracy(
    model: nn.Module, train_set: Pictures, evaluation: Pictures, calibration: Pictures
) -> dict[str, object]:
    """The card's section on accuracy."""
    with half_pruned(model, calibration):
        pruned = top1(model, evaluation)
    return {
        "top1_evaluation": round(top1(model, evaluation), 4),
        "top1_train": round(top1(model, train_set.first(len(evaluation))), 4),
        "top1_half_pruned": round(pruned, 4),
        "per_class": per_class(model, evaluation),
    }


def card(
    name: str, recipe: Recipe, scores: dict[str, object], *, minutes: float, command: str
) -> dict[str, object]:
    """The model card, ready for JSON."""
    return {
        "format": 1,
        "name": name,
        "architecture": ARCHITECTURES[name].family,
        "kwargs": ARCHITECTURES[name].kwargs,
        "pretrained_cfg": {
            "architecture": name,
            "input_size": [3, SIDE, SIDE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": len(CLASSES),
            "label_names": list(CLASSES),
            "classifier": ARCHITECTURES[name].classifier,
            "first_conv": ARCHITECTURES[name].first_conv,
        },
        "data": {"seeds": SPLIT_SEEDS}
        | {f"{split}_images": getattr(recipe, f"{split}_images") for split in SPLITS},
        "training": {"command": command, "minutes": round(minutes, 1), **asdict(recipe)},
        "accuracy": scores,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
    }


def write(folder: Path, model: nn.Module, model_card: dict[str, object]) -> None:
    """Write the model and its card, under the card's name, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model_card, indent=2) + "\n"
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with new_file(folder / f"{model_card['name']}.safetensors") as partial:
        save_file(weights, partial)
    write_text(folder / f"{model_card['name']}.json", text)
