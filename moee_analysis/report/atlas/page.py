"""The atlas: facts about experts and images in JSON's types, and the one file that shows them."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import nn

from moee_analysis import measure
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.inputs import batches_of
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.measure.routing.top_patches import Typical
from moee_analysis.models.capture import evaluating
from moee_analysis.models.loading import class_labels
from moee_analysis.models.merging import merging_blocks
from moee_analysis.moe.layer import moe_layers
from moee_analysis.report.pages.site import render
from moee_analysis.report.pictures import shrink
from moee_analysis.utils.environment import version
from moee_analysis.utils.progress import progress, tell_progress
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.refusals import check_place

STYLE_AND_SCRIPTS = ("atlas.css", "atlas_state.js", "atlas_expert.js", "atlas_image.js")
HERE = Path(__file__).parent
PATCHES = 12  # typical ones of an expert, at most one of an image
OTHERS = 5  # classes, parts and other experts that are listed, at most
DIGITS = 4
LONGEST = 224  # pixels of the longer side of a picture, at most
QUALITY = 78
LOSSLESS_BELOW = 100  # pixels of the longer side

Facts = dict[str, Any]
Tables = dict[str, pd.DataFrame]


def write_atlas(
    run: Extraction, images: ImageSet, out: str | Path, *, dense: nn.Module | None = None
) -> Path:
    """Write the atlas of a run as one HTML file, which needs no server and no network.

    It shows every layer with one expert per token whose patches have places in the image. All that
    it says but the neurons of experts is measured on ``images``; their folders are the classes,
    whatever their names. Without the ``dense`` model it tells no predictions of it and no savings.
    """
    out = Path(out)
    check_place(out)
    write_text(out, page(atlas_facts(run, images, dense=dense)))
    return out


@dataclass(frozen=True)
class Seen:
    """A run and what its experts do on some images."""

    run: Extraction
    images: ImageSet
    routed: Routes
    known: Typical
    tokens: Mapping[int, np.ndarray]


def atlas_facts(run: Extraction, images: ImageSet, *, dense: nn.Module | None = None) -> Facts:
    """Return all that the page shows, in JSON's types.

    ``layers`` with their experts; ``images`` (class, picture, predictions); ``about``, names and
    values; ``absent``, the layers not shown, and why.
    """
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")
    tell_progress(f"routing {len(images)} images")
    routed = measure.routes(run, images, by_folder=True)
    if not routed.placed:
        expected = "a layer with one expert per token whose patches have known places"
        hint = "extract experts of layers that see the patches of an image"
        raise MoeeError(expected, "none", hint)
    tell_progress("finding what is typical of every expert")
    merges = merging_blocks(run.model) is not None
    tokens = measure.token_places(run, images) if merges else {}
    seen = Seen(run, images, routed, measure.typical(run, images, routed), tokens)
    layers, absent = _layers(seen), []
    for layer in run.layers:
        if layer.index not in routed.placed:
            told = f"stayed dense: {layer.reason}"
            why = "has no patches with places" if layer.converted else told
            absent.append(f"layer {layer.index} {why}")
    return {
        "about": _about(seen, dense, layers),
        "absent": f"Not shown: {'; '.join(absent)}." if absent else "",
        "layers": layers,
        "images": _images(seen, dense),
    }


def page(facts: Facts) -> str:
    """Return the HTML of ``facts``.

    The browser runs the page's own script and nothing else, even if a name were taken for markup:
    the content security policy lists the hashes of script and style.
    """
    style, *scripts = ((HERE / name).read_text(encoding="utf-8") for name in STYLE_AND_SCRIPTS)
    texts = {"style": style, "script": '"use strict";\n' + "\n".join(scripts)}
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}
    hashes = {name: f"'sha256-{_base64(digest)}'" for name, digest in digests.items()}
    return render("atlas/atlas.html", hashes=hashes, **texts, **facts)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _about(seen: Seen, dense: nn.Module | None, layers: list[Facts]) -> list[tuple[str, str]]:
    run, savings = seen.run, {}
    if dense is not None:
        costs = measure.macs(replace(run, original=dense), routes=seen.routed)
        total = costs.set_index("component").loc["total"]
        macs, parameters = (total[kind] / total[f"{kind}_dense"] - 1 for kind in ("macs", "params"))
        savings = {
            "MACs": f"{macs:+.1%} of the dense model's".replace("-", "−"),
            "Stored parameters": f"{parameters:+.1%}".replace("-", "−"),
        }
    experts = sum(len(layer["experts"]) for layer in layers)
    return [
        ("Model", str(run.provenance["model"])),
        ("Recipe", f"{run.config.recipe}, seed {run.config.seed}"),
        ("Experts", f"{experts} in {len(layers)} of {len(run.layers)} layers"),
        ("Images", f"{len(seen.images)} of {seen.images.name}"),
        *savings.items(),
        ("Made", f"{datetime.now().astimezone():%Y-%m-%d}, moee-analysis {version()}"),
    ]


def _layers(seen: Seen) -> list[Facts]:
    """The layers that can be shown, in order, each with its experts."""
    run, images, routed, shown = seen.run, seen.images, seen.routed, seen.routed.placed
    given = {"layers": shown, "routed": routed, "known": seen.known}
    pairs = measure.overlap(run, layers=shown).query("expert_a != expert_b")
    tables = {
        "top": measure.top_patches(run, images, count=PATCHES, **given),
        "classes": measure.class_routing(routed, layers=shown),
        "overlap": pairs.rename(columns={"expert_a": "expert"}),
    }
    if images.parts:
        tables["parts"] = measure.part_profile(routed, images, layers=shown)
    return [_layer(seen, layer, _choose(tables, "layer", layer)) for layer in shown]


def _choose(tables: Tables, column: str, value: int) -> Tables:
    return {name: table[table[column] == value] for name, table in tables.items()}


def _layer(seen: Seen, layer: int, tables: Tables) -> Facts:
    """``routes`` are the experts of the patches, image after image and row by row, as base64.

    So are the ``tokens`` that they have become, where any merge.
    """
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
                "share": round(float(counts[expert] / experts.size), DIGITS),
                "images": int((experts == expert).any(axis=(1, 2)).sum()),
                "leading": int((leading == expert).sum()),
                "neurons": module.expert_sizes[expert],
                "near": near[expert],
                **_lists_of_expert(_choose(tables, "expert", expert)),
            }
            for expert in range(module.n_experts)
        ],
        **{
            name: _base64(each.astype("<u2").tobytes())
            for name, each in (("routes", experts), ("tokens", seen.tokens.get(layer)))
            if each is not None
        },
    }


def _lists_of_expert(rows: Tables) -> dict[str, list[list[Any]]]:
    """Typical patches, overlapping experts, and classes and parts beyond their usual shares."""
    top, overlap = rows["top"], rows["overlap"].nlargest(OTHERS, "jaccard")
    lists = {"top": _lists(top, "image", "row", "column", "cosine"), "classes": [], "parts": []}
    for kind, name in (("classes", "class_name"), ("parts", "part")):
        if kind in rows:
            ahead = rows[kind].assign(ahead=rows[kind]["share"] - rows[kind]["share_all"])
            ahead = ahead[ahead["ahead"] > 0].nlargest(OTHERS, "ahead").astype({name: str})
            lists[kind] = _lists(ahead, name, "share", "share_all")
    return lists | {"overlap": _lists(overlap, "expert_b", "jaccard", "expected_jaccard")}


def _near(means: np.ndarray, tokens: np.ndarray) -> list[list[list[float]]]:
    """The experts of the most similar mean inputs of each: expert, centred cosine, raw cosine.

    Experts that no token of these images goes to have no mean, and none near them.
    """
    met = np.flatnonzero(np.isfinite(means).all(axis=1))
    near: list[list[list[float]]] = [[] for _ in means]
    if len(met) < 2:
        return near
    pairs = measure.similarity({0: means[met]}, shares={0: tokens[met]})
    pairs = pairs.query("expert_a != expert_b")
    for expert, rows in pairs.assign(other=met[pairs["expert_b"]]).groupby("expert_a"):
        best = rows.nlargest(OTHERS, "cosine_centred")
        near[met[expert]] = _lists(best, "other", "cosine_centred", "cosine")
    return near


def _lists(rows: pd.DataFrame, *columns: str) -> list[list[Any]]:
    """The ``columns`` of each row, numbers as short as the page needs them."""
    values = zip(*(rows[column].tolist() for column in columns), strict=True)
    return [[round(v, DIGITS) if isinstance(v, float) else v for v in row] for row in values]


def _images(seen: Seen, dense: nn.Module | None) -> list[Facts]:
    """Class, picture and predictions of every image."""
    tell_progress("predicting, and making the pictures small")
    models = {"moe": seen.run.model} | ({} if dense is None else {"dense": dense})
    predicted = {name: _predictions(model, seen.images) for name, model in models.items()}
    facts = []
    for index in progress(range(len(seen.images)), label="pictures"):
        pixels = np.ascontiguousarray(seen.images.as_seen(index, seen.run.model))
        small = max(pixels.shape[:2]) < LOSSLESS_BELOW
        options = {"lossless": True} if small else {"quality": QUALITY}
        picture = shrink(Image.fromarray(pixels), LONGEST, format="WEBP", method=6, **options)
        name = seen.routed.class_names[int(seen.routed.labels[index])]
        labels = {system: each[index] for system, each in predicted.items()}
        facts.append({"class": name, "picture": _base64(picture), **labels})
    return facts


def _predictions(model: nn.Module, images: ImageSet) -> list[str]:
    names, found = class_labels(model), []
    with evaluating(model):
        for x in batches_of(model, images, label="predictions"):
            found += model(x).argmax(dim=1).tolist()
    return [names[index] if index < len(names) else f"class {index}" for index in found]
