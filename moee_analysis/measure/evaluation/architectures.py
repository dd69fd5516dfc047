"""Several architectures side by side: what their layers fall apart into, and what they keep."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.variants import Variant, extract_all, variants
from moee_analysis.measure.routing.classes import class_information
from moee_analysis.measure.routing.experts import similarity, similarity_summary
from moee_analysis.measure.routing.load_balance import balance
from moee_analysis.measure.routing.part_alignment import modularity
from moee_analysis.measure.routing.routes import routes
from moee_analysis.measure.routing.tables import add_caption, stack
from moee_analysis.models.loading import find_mlps
from moee_analysis.utils.checks import draw_numbers


def architectures(
    runs: Mapping[str, Extraction],
    images: ImageSet,
    *,
    permutations: int = 100,
    resamples: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the same of every layer of several models.

    ``runs`` are extractions by the name of their model; all models know the classes of ``images``.

    A row for every model, layer and quantity: ``model``, ``layer``, ``depth`` (share of the layers
    up to the middle of this one), ``tokens`` (of an image, in this layer), ``dim``, ``quantity``,
    ``value``, ``chance`` (nan where nothing is to be expected by chance). Quantities: ``experts``,
    their number, 0 in layers that stay dense, which have no others; ``active``, share of the hidden
    neurons that a token uses; ``evenness``, entropy of the experts' use, 1 is even; ``class``, how
    much of it the class of the image explains, bias removed; ``similarity``, mean cosine of the
    experts' mean inputs; ``part``, as of ``modularity``, where images have masks.
    Raises MoeeError: no runs.
    """
    if not runs:
        raise MoeeError("a run or more", "none", "extract some")
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    drawn = {"permutations": permutations, "resamples": resamples, "seed": seed}
    return add_caption(
        stack(((name, _layers(run, images, drawn)) for name, run in runs.items()), by=["model"]),
        f"{len(images)} images, the same for all; dotted: what chance gives, with labels or masks "
        "exchanged between images.",
    )


def architecture_variants(
    models: Mapping[str, nn.Module],
    calibration: ImageSet,
    images: ImageSet,
    configs: Mapping[str, ExtractConfig],
    *,
    store: str | Path,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Extract every configuration from every model, and evaluate them with random routing beside.

    Columns: ``model`` and those of ``measure.variants``, where a variant is the name of a
    configuration, or that with ``, random routing``.
    Raises MoeeError: no models, or what ``measure.variants`` refuses.
    """
    if not models:
        raise MoeeError("a model or more", "none", "load some")
    draw_numbers(seed, resamples=resamples)
    parts = []
    for name, dense in models.items():
        made = extract_all(dense, calibration, configs.values(), store)
        tried: dict[str, Variant] = {"dense": dense}
        for variant, config in configs.items():
            tried[variant] = config
            run = made[config].result
            if config.experts != "one" and run is not None:
                tried[f"{variant}, random routing"] = randomly_routed(run, seed=seed)
        drawn = {"seed": seed, "resamples": resamples}
        parts.append((name, variants(dense, calibration, images, tried, store=store, **drawn)))
    return add_caption(stack(parts, by=["model"]), parts[0][1].attrs["caption"])


def _layers(run: Extraction, images: ImageSet, drawn: Mapping[str, int]) -> pd.DataFrame:
    sites, tokens = find_mlps(run.dense()), {}
    report = pd.DataFrame([asdict(layer) for layer in run.layers])
    found = [("experts", report["index"], report["experts"], np.nan)]
    converted = report[report["converted"]]
    if len(converted):
        routed = routes(run, images)
        tokens = routed.tokens_per_image
        even = balance(routed, resamples=2, seed=drawn["seed"]).query("metric == 'entropy'")
        alike = similarity_summary(similarity(run))
        known = class_information(routed, **drawn)
        found += [
            ("active", converted["index"], converted["active_fraction"], np.nan),
            ("evenness", even["layer"], even["value"], np.nan),
            ("class", known["layer"], known["corrected"], 0.0),
            ("similarity", alike["layer"], alike["mean"], np.nan),
        ]
        if images.parts and routed.placed:
            shown = modularity(routed, images, **drawn)
            found.append(("part", shown["layer"], shown["ami"], shown["null_mean"]))
    columns = ("quantity", "layer", "value", "chance")
    parts = [pd.DataFrame(dict(zip(columns, each, strict=True))) for each in found]
    values = pd.concat(parts).astype({"value": float, "chance": float})
    facts = pd.DataFrame({"layer": [site.index for site in sites]})
    facts["depth"] = (np.arange(len(sites)) + 0.5) / len(sites)
    facts["tokens"] = facts["layer"].map(tokens)
    facts["dim"] = [site.dim for site in sites]
    # the quantities are in the order in which they are shown, which the merge keeps in a layer
    return facts.merge(values, on="layer")
