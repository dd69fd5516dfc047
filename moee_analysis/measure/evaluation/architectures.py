"""Several architectures side by side: what their layers fall apart into, and what they keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.evaluation.variants import made_of, variants
from moee_analysis.measure.routing.class_routing import class_information
from moee_analysis.measure.routing.expert_similarity import similarity, similarity_summary
from moee_analysis.measure.routing.load_balance import balance
from moee_analysis.measure.routing.part_alignment import modularity
from moee_analysis.measure.routing.routes import Routes, routes
from moee_analysis.models.loading import find_mlps
from moee_analysis.utils.checks import draw_numbers

QUANTITIES = ("experts", "active", "evenness", "class", "similarity", "part")
"""What is measured of every layer, each explained in :func:`architectures`."""


def architectures(
    runs: Mapping[str, Extraction],
    images: ImageSet,
    *,
    permutations: int = 100,
    resamples: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the same of every layer of several models.

    Parameters
    ----------
    runs
        Extractions by the name of their model.
    images
        Evaluation images that all of them know the classes of.
    permutations, resamples, seed
        Of what chance gives.

    Returns
    -------
    DataFrame
        A row for every model, layer and quantity: ``model``, ``layer``, ``depth`` (share of the
        layers up to the middle of this one), ``tokens`` (of an image, in this layer), ``dim``,
        ``quantity``, ``value``, ``chance`` (nan where nothing is to be expected by chance). Layers
        that stay dense have 0 experts, and no other quantities. The quantities: ``experts``, their
        number; ``active``, share of the hidden neurons that a token uses; ``evenness``, entropy of
        the experts' use, 1 is even; ``class``, how much of the experts' entropy the class of the
        image explains, bias removed; ``similarity``, mean cosine of the experts' mean inputs;
        ``part``, adjusted mutual information with the part that a patch shows, where images have
        masks.

    Raises
    ------
    MoeeError
        No runs.
    """
    if not runs:
        raise MoeeError("a run or more", "none", "extract some")
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    drawn = {"permutations": permutations, "resamples": resamples, "seed": seed}
    table = pd.concat(
        [_layers(name, run, images, drawn) for name, run in runs.items()], ignore_index=True
    )
    table.attrs["caption"] = (
        f"{len(images)} images, the same for all; dotted: what chance gives, with labels or masks "
        "exchanged between images."
    )
    return table


def _layers(name: str, run: Extraction, images: ImageSet, drawn: Mapping[str, int]) -> pd.DataFrame:
    sites = find_mlps(run.dense())
    rows = [_row(layer.index, "experts", layer.experts) for layer in run.layers]
    if any(layer.converted for layer in run.layers):
        routed = routes(run, images)
        rows += [*_of_layers(run), *_of_routes(run, routed, images, drawn)]
        tokens = routed.tokens_per_image
    else:
        tokens = {}
    table = pd.DataFrame(rows)
    facts = pd.DataFrame(
        {
            "layer": [site.index for site in sites],
            "depth": (np.arange(len(sites)) + 0.5) / len(sites),
            "tokens": [tokens.get(site.index, np.nan) for site in sites],
            "dim": [site.dim for site in sites],
        }
    )
    ordered = facts.merge(table, on="layer").sort_values(["layer", "place"], kind="stable")
    ordered.insert(0, "model", name)
    return ordered.drop(columns="place")


def _row(layer: int, quantity: str, value: float, chance: float = np.nan) -> dict[str, Any]:
    place = QUANTITIES.index(quantity)
    return {
        "layer": layer, "quantity": quantity, "value": float(value), "chance": float(chance),
        "place": place,
    }  # fmt: skip


def _of_layers(run: Extraction) -> Iterator[dict[str, Any]]:
    """What needs no images."""
    for layer in run.layers:
        if layer.converted:
            yield _row(layer.index, "active", layer.active_fraction)
    summary = similarity_summary(similarity(run))
    for layer, mean in zip(summary["layer"], summary["mean"], strict=True):
        yield _row(layer, "similarity", mean)


def _of_routes(
    run: Extraction, routed: Routes, images: ImageSet, drawn: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    even = balance(routed, resamples=2, seed=drawn["seed"])
    even = even[even["metric"] == "entropy"]
    for layer, value in zip(even["layer"], even["value"], strict=True):
        yield _row(layer, "evenness", value)
    known = class_information(routed, **drawn)
    for row in known.itertuples():
        yield _row(row.layer, "class", row.corrected, 0.0)
    if images.parts and routed.placed:
        shown = modularity(routed, images, **drawn)
        for row in shown.itertuples():
            yield _row(row.layer, "part", row.ami, row.null_mean)


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

    Returns
    -------
    DataFrame
        ``model`` and the columns of ``measure.variants``; a variant is the name of a configuration,
        or that with ``, random routing``.

    Raises
    ------
    MoeeError
        No models, or what ``measure.variants`` refuses.
    """
    if not models:
        raise MoeeError("a model or more", "none", "load some")
    draw_numbers(seed, resamples=resamples)
    tables = []
    for name, dense in models.items():
        made = made_of(dense, calibration, configs.values(), store)
        tried: dict[str, Any] = {"dense": dense}
        for variant, config in configs.items():
            tried[variant] = config
            if config.experts != "one" and made[config].run is not None:
                tried[f"{variant}, random routing"] = randomly_routed(made[config].run, seed=seed)
        table = variants(
            dense, calibration, images, tried, store=store, seed=seed, resamples=resamples
        )
        tables.append(table.assign(model=name))
    found = pd.concat(tables, ignore_index=True)
    found.attrs["caption"] = tables[0].attrs["caption"]
    return found[["model", *found.columns.drop("model")]]
