"""What the atlas knows of each expert, in JSON's types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moee_analysis import measure
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.measure.routing.top_patches import Typical
from moee_analysis.moe.layer import moe_layers

PATCHES = 12
"""Typical patches of an expert, at most one of an image."""

OTHERS = 5
"""Classes, parts and other experts that are listed, at most."""

DIGITS = 4


@dataclass(frozen=True)
class Seen:
    """A run and what its experts do on some images."""

    run: Extraction
    images: ImageSet
    routed: Routes
    known: Typical


def seen_through(run: Extraction, images: ImageSet) -> Seen:
    """Route ``images`` through the run; their classes are their folders.

    Raises
    ------
    MoeeError
        No image; no layer with one expert per token whose patches have known places.
    """
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")
    routed = measure.routes(run, images, by_folder=True)
    if not routed.placed:
        raise MoeeError(
            "a layer with one expert per token whose patches have known places", "none",
            "extract experts of layers that see the patches of an image",
        )  # fmt: skip
    return Seen(run, images, routed, measure.typical(run, images, routed))


def layer_facts(seen: Seen) -> list[dict[str, Any]]:
    """Return the layers that can be shown, in order, each with its experts."""
    shown = seen.routed.placed
    top = measure.top_patches(
        seen.run, seen.images, layers=shown, count=PATCHES, routed=seen.routed, known=seen.known
    )
    classes = measure.class_routing(seen.routed, layers=shown)
    parts = None
    if seen.images.parts:
        parts = measure.part_profile(seen.routed, seen.images, layers=shown)
    overlap = measure.overlap(seen.run, layers=shown)
    tables = {"top": top, "classes": classes, "parts": parts, "overlap": overlap}
    return [
        _layer(seen, layer, {name: _rows(table, layer) for name, table in tables.items()})
        for layer in shown
    ]


def _rows(table: pd.DataFrame | None, layer: int) -> pd.DataFrame | None:
    return None if table is None else table[table["layer"] == layer]


def _layer(seen: Seen, layer: int, tables: dict[str, pd.DataFrame | None]) -> dict[str, Any]:
    module, experts = moe_layers(seen.run.model)[layer], seen.routed.patch_experts(layer)
    counts = np.bincount(experts.ravel(), minlength=module.n_experts)
    images = [int((experts == e).any(axis=(1, 2)).sum()) for e in range(module.n_experts)]
    near = _near(seen.known.means[layer], seen.routed.counts[layer].sum(axis=0))
    prefix = seen.routed.prefix_tokens[layer]
    leading = seen.routed.experts[layer][:, :prefix]
    return {
        "layer": layer,
        "grid": list(experts.shape[1:]),
        "hidden": module.hidden_dense,
        "experts": [
            {
                "share": _short(counts[expert] / experts.size),
                "images": images[expert],
                "leading": int((leading == expert).sum()),
                "neurons": module.expert_sizes[expert],
                "near": near[expert],
                "top": _top(_of(tables["top"], expert)),
                "classes": _ahead(_of(tables["classes"], expert), "class_name"),
                "parts": _ahead(_of(tables["parts"], expert), "part"),
                "overlap": _overlap(tables["overlap"], expert),
            }
            for expert in range(module.n_experts)
        ],
    }


def _of(table: pd.DataFrame | None, expert: int) -> pd.DataFrame | None:
    return None if table is None else table[table["expert"] == expert]


def _top(rows: pd.DataFrame) -> list[list[float]]:
    """Image, row, column and cosine of each typical patch."""
    columns = zip(rows["image"], rows["row"], rows["column"], rows["cosine"], strict=True)
    return [[int(i), int(r), int(c), _short(cosine)] for i, r, c, cosine in columns]


def _ahead(rows: pd.DataFrame | None, name: str) -> list[list[Any]]:
    """The names of which there is most beyond the usual: name, share, usual share."""
    if rows is None:
        return []
    ahead = rows.assign(ahead=rows["share"] - rows["share_all"])
    ahead = ahead[ahead["ahead"] > 0].nlargest(OTHERS, "ahead")
    columns = zip(ahead[name], ahead["share"], ahead["share_all"], strict=True)
    return [[str(n), _short(share), _short(usual)] for n, share, usual in columns]


def _near(means: np.ndarray, tokens: np.ndarray) -> list[list[list[float]]]:
    """For every expert those of the most similar mean inputs: expert, centred cosine, raw cosine.

    Experts that no token of these images goes to have no mean, and none near them.
    """
    met = np.flatnonzero(np.isfinite(means).all(axis=1))
    near: list[list[list[float]]] = [[] for _ in means]
    if len(met) < 2:
        return near
    pairs = measure.similarity({0: means[met]}, shares={0: tokens[met]})
    for expert, rows in pairs[pairs["expert_a"] != pairs["expert_b"]].groupby("expert_a"):
        best = rows.nlargest(OTHERS, "cosine_centred")
        columns = zip(best["expert_b"], best["cosine_centred"], best["cosine"], strict=True)
        near[met[expert]] = [[int(met[e]), _short(c), _short(raw)] for e, c, raw in columns]
    return near


def _overlap(table: pd.DataFrame, expert: int) -> list[list[float]]:
    """Other experts of most neurons in common: expert, Jaccard index, the same by chance."""
    rows = table[(table["expert_a"] == expert) & (table["expert_b"] != expert)]
    best = rows.nlargest(OTHERS, "jaccard")
    columns = zip(best["expert_b"], best["jaccard"], best["expected_jaccard"], strict=True)
    return [[int(e), _short(share), _short(chance)] for e, share, chance in columns]


def _short(value: float) -> float:
    return round(float(value), DIGITS)
