"""The images of the atlas, and the expert of each of their patches, as text that a page carries."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from moee_analysis.data.images import fitting_batch
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import class_labels
from moee_analysis.report.atlas.facts import Seen
from moee_analysis.utils.progress import progress

LONGEST = 224  # pixels of the longer side of a picture, at most
QUALITY = 78
LOSSLESS_BELOW = 100  # pixels of the longer side


def image_facts(seen: Seen, dense: nn.Module | None) -> list[dict[str, Any]]:
    """Return class, picture and predictions of every image."""
    systems = {"moe": seen.run.model} | ({"dense": dense} if dense is not None else {})
    predictions = {name: _predictions(model, seen) for name, model in systems.items()}
    return [
        {
            "class": seen.routed.class_names[int(seen.routed.labels[index])],
            "picture": _packed(seen.images.as_seen(index, seen.run.model)),
            **{name: labels[index] for name, labels in predictions.items()},
        }
        for index in progress(range(len(seen.images)), label="pictures")
    ]


def packed_routes(seen: Seen, layer: int) -> str:
    """Base64 of the expert of each patch, image after image and row by row, two bytes each."""
    experts = seen.routed.patch_experts(layer)
    return base64.b64encode(experts.astype("<u2").tobytes()).decode()


def _predictions(model: nn.Module, seen: Seen) -> list[str]:
    names, found = class_labels(model), []
    like = next(model.parameters())
    with evaluating(model):
        for x in seen.images.batches(model, batch_size=fitting_batch(model)):
            found += model(x.to(like)).argmax(dim=1).tolist()
    return [names[index] if index < len(names) else f"class {index}" for index in found]


def _packed(pixels: np.ndarray) -> str:
    """Base64 of a picture as WebP, without loss where it is small."""
    buffer, image = io.BytesIO(), Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((LONGEST, LONGEST))
    small = max(image.size) < LOSSLESS_BELOW
    options = {"lossless": True} if small else {"quality": QUALITY}
    image.save(buffer, format="WEBP", method=6, **options)
    return base64.b64encode(buffer.getvalue()).decode()
