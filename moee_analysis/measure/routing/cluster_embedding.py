"""The steps of an extraction as tables: where the tokens lie, which clusters they form."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.cluster.clustering import cluster, reduce_dimensions
from moee_analysis.extraction.cluster.clusters_to_router import cluster_tokens
from moee_analysis.extraction.cluster.sample_tokens import sample_tokens
from moee_analysis.extraction.plan import prefix_experts
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.extraction.run import Extraction
from moee_analysis.utils.checks import layer_numbers, seed_number


def embedding(
    run: Extraction,
    images: ImageSet,
    *,
    layers: Sequence[int],
    store: str | Path,
    points: int = 4000,
    seed: int = 0,
) -> pd.DataFrame:
    """Hidden activations of some clustered tokens, embedded in the plane by UMAP.

    The clusters are the run's own; the plane is only for the eye.

    ``images`` are the run's own calibration images, ``points`` the most tokens per layer.

    A row per token: ``layer``, ``x``, ``y``, ``cluster`` (-1: in none).
    """
    seed_number(seed)
    found = _clusters(run, images, layers, Path(store))
    tables = []
    for layer, (hidden, labels) in found.items():
        rng = np.random.default_rng([seed, layer])
        shown = rng.permutation(len(hidden))[:points]
        config = replace(run.config.clustering, reduce="umap")
        place = reduce_dimensions(hidden[shown], config, seed=seed, components=2)
        columns = {"layer": layer, "x": place[:, 0], "y": place[:, 1], "cluster": labels[shown]}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def surrogate(
    run: Extraction, images: ImageSet, *, layers: Sequence[int], store: str | Path, seed: int = 0
) -> pd.DataFrame:
    """Clusters found in the activations, and in noise made to look like them.

    The surrogate has the same principal components with the same values, each shuffled over the
    tokens on its own: the covariance stays, any clusters go. What is found there, the reduction
    and HDBSCAN invent.

    Columns: ``layer``, ``data`` (``activations`` or ``surrogate``), ``clusters``, ``noise_share``,
    ``tokens``.
    """
    seed_number(seed)
    rows = []
    for layer, (hidden, labels) in _clusters(run, images, layers, Path(store)).items():
        noise = _shuffle_components(hidden, np.random.default_rng([seed, layer]))
        invented = cluster(noise, run.config.clustering, seed=seed).labels
        rows += [
            {
                "layer": layer,
                "data": data,
                "clusters": int(found.max()) + 1,
                "noise_share": float(np.mean(found < 0)),
                "tokens": len(found),
            }
            for data, found in (("activations", labels), ("surrogate", invented))
        ]
    return pd.DataFrame(rows)


def _shuffle_components(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean = points.mean(axis=0)
    scores, scale, axes = np.linalg.svd(points - mean, full_matrices=False)
    return (rng.permuted(scores, axis=0) * scale) @ axes + mean


def _clusters(
    run: Extraction, images: ImageSet, layers: Sequence[int], store: Path
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Clustered activations, float32 (tokens, hidden), and their labels, by layer."""
    layer_numbers(layers)
    calibration = calibration_tokens(run.dense(), images, run.config, root=store)
    sites = [site for site in calibration.sites if site.index in layers]
    wanted = {site.name: len(prefix_experts(calibration, site, run.config)) for site in sites}
    found = {}
    for draw in sample_tokens(calibration, run.config, wanted, hidden=True):
        labels = cluster_tokens(draw, run.config, root=store)
        found[draw.site.index] = draw.hidden, labels
    return found
