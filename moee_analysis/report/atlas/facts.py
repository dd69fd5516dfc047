"""The facts of the atlas about each expert, in JSON's types.

The images of the atlas, and the expert of each of their patches, as text that a page carries.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import nn

from moee_analysis import measure
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.measure.routing.top_patches import Typical
from moee_analysis.models.capture import evaluating
from moee_analysis.models.loading import class_labels
from moee_analysis.moe.layer import moe_layers
from moee_analysis.utils.progress import progress

PATCHES = 12  # typical ones of an expert, at most one of an image
OTHERS = 5  # classes, parts and other experts that are listed, at most
DIGITS = 4


@dataclass(frozen=True)
class Seen:
    """A run and what its experts do on some images."""

    run: Extraction
    images: ImageSet
    routed: Routes
    known: Typical


def look_through(run: Extraction, images: ImageSet) -> Seen:
    """Route ``images`` through the run; their classes are their folders."""
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")
    routed = measure.routes(run, images, by_folder=True)
    if not routed.placed:
        expected = "a layer with one expert per token whose patches have known places"
        hint = "extract experts of layers that see the patches of an image"
        raise MoeeError(expected, "none", hint)
    return Seen(run, images, routed, measure.typical(run, images, routed))


def layer_facts(seen: Seen) -> list[dict[str, Any]]:
    """Return the layers that can be shown, in order, each with its experts."""
    run, images, routed, shown = seen.run, seen.images, seen.routed, seen.routed.placed
    tables = {
        "top": measure.top_patches(
            run, images, layers=shown, count=PATCHES, routed=routed, known=seen.known
        ),
        "classes": measure.class_routing(routed, layers=shown),
        "overlap": measure.overlap(run, layers=shown).rename(columns={"expert_a": "expert"}),
    }
    if images.parts:
        tables["parts"] = measure.part_profile(routed, images, layers=shown)
    return [_layer(seen, layer, _rows(tables, "layer", layer)) for layer in shown]


def _rows(tables: dict[str, pd.DataFrame], column: str, value: int) -> dict[str, pd.DataFrame]:
    return {name: table[table[column] == value] for name, table in tables.items()}


def _layer(seen: Seen, layer: int, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    module, experts = moe_layers(seen.run.model)[layer], seen.routed.patch_experts(layer)
    counts = np.bincount(experts.ravel(), minlength=module.n_experts)
    leading = seen.routed.experts[layer][:, : seen.routed.prefix_tokens[layer]]
    near = _near(seen.known.means[layer], seen.routed.counts[layer].sum(axis=0))
    return {
        "layer": layer,
        "grid": list(experts.shape[1:]),
        "hidden": module.hidden_dense,
        "experts": [
            {
                "share": _short(counts[expert] / experts.size),
                "images": int((experts == expert).any(axis=(1, 2)).sum()),
                "leading": int((leading == expert).sum()),
                "neurons": module.expert_sizes[expert],
                "near": near[expert],
                **_listed(_rows(tables, "expert", expert)),
            }
            for expert in range(module.n_experts)
        ],
    }


def _listed(rows: dict[str, pd.DataFrame]) -> dict[str, list[list[Any]]]:
    """Typical patches, classes, parts and overlapping experts of one expert, from its rows."""
    overlap = rows["overlap"][rows["overlap"]["expert_b"] != rows["overlap"]["expert"]]
    best = overlap.nlargest(OTHERS, "jaccard")
    return {
        "top": _lists(rows["top"], "image", "row", "column", "cosine"),
        "classes": _ahead(rows["classes"], "class_name"),
        "parts": _ahead(rows.get("parts"), "part"),
        "overlap": _lists(best, "expert_b", "jaccard", "expected_jaccard"),
    }


def _ahead(rows: pd.DataFrame | None, name: str) -> list[list[Any]]:
    """The names whose share is most beyond the usual: name, share, usual share."""
    if rows is None:
        return []
    ahead = rows.assign(ahead=rows["share"] - rows["share_all"])
    ahead = ahead[ahead["ahead"] > 0].nlargest(OTHERS, "ahead")
    return _lists(ahead.astype({name: str}), name, "share", "share_all")


def _near(means: np.ndarray, tokens: np.ndarray) -> list[list[list[float]]]:
    """The experts of the most similar mean inputs of each: expert, centred cosine, raw cosine.

    Experts that no token of these images goes to have no mean, and none near them.
    """
    met = np.flatnonzero(np.isfinite(means).all(axis=1))
    near: list[list[list[float]]] = [[] for _ in means]
    if len(met) < 2:
        return near
    pairs = measure.similarity({0: means[met]}, shares={0: tokens[met]})
    pairs = pairs[pairs["expert_a"] != pairs["expert_b"]]
    for expert, rows in pairs.assign(other=met[pairs["expert_b"]]).groupby("expert_a"):
        best = rows.nlargest(OTHERS, "cosine_centred")
        near[met[expert]] = _lists(best, "other", "cosine_centred", "cosine")
    return near


def _lists(rows: pd.DataFrame, *columns: str) -> list[list[Any]]:
    """The ``columns`` of each row, numbers as short as the page needs them."""
    lists = zip(*(rows[column].tolist() for column in columns), strict=True)
    return [[_short(v) if isinstance(v, float) else v for v in values] for values in lists]


def _short(value: float) -> float:
    return round(float(value), DIGITS)


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
