"""The steps of an extraction as tables: where the tokens lie, which clusters they form."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.cluster.clustering import cluster, reduce_dimensions
from moee_analysis.extraction.cluster.clusters_to_router import cluster_tokens
from moee_analysis.extraction.cluster.sample_tokens import sample_tokens
from moee_analysis.extraction.merging import recorded_model
from moee_analysis.extraction.pipeline import prefix_experts
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.inputs import Layers
from moee_analysis.measure.routing.tables import stack
from moee_analysis.utils.checks import layer_numbers, seed_number


def embedding(
    run: Extraction, images: ImageSet, *, layers: Layers, store: str | Path, points: int = 4000,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Hidden activations of some clustered tokens, embedded in the plane by UMAP for the eye.

    ``images`` are the run's own calibration images, ``points`` the most tokens per layer.

    A row per token: ``layer``, ``x``, ``y``, ``cluster`` (-1: in none).
    """
    seed_number(seed)
    config, parts = replace(run.config.clustering, reduce="umap", components=2), []
    for layer, hidden, labels in _cluster_layers(run, images, layers, Path(store)):
        shown = np.random.default_rng([seed, layer]).permutation(len(hidden))[:points]
        place = reduce_dimensions(hidden[shown], config, seed=seed)
        parts.append((layer, pd.DataFrame(place, columns=["x", "y"]).assign(cluster=labels[shown])))
    return stack(parts, by=["layer"])


def surrogate(
    run: Extraction, images: ImageSet, *, layers: Layers, store: str | Path, seed: int = 0
) -> pd.DataFrame:
    """Clusters found in the activations, and in noise made to look like them.

    The surrogate has the same principal components with the same values, each shuffled over the
    tokens: the covariance stays, any clusters go. What is found there, UMAP and HDBSCAN invent.

    A row per ``layer`` and ``data`` (activations, surrogate): ``clusters``, ``noise_share``,
    ``tokens``.
    """
    seed_number(seed)
    rows = []
    for layer, hidden, labels in _cluster_layers(run, images, layers, Path(store)):
        noise = _shuffle_components(hidden, np.random.default_rng([seed, layer]))
        invented = cluster(noise, run.config.clustering, seed=seed).labels
        for data, found in (("activations", labels), ("surrogate", invented)):
            clusters, noise_share = int(found.max()) + 1, float(np.mean(found < 0))
            rows.append((layer, data, clusters, noise_share, len(found)))
    return pd.DataFrame(rows, columns=["layer", "data", "clusters", "noise_share", "tokens"])


def _shuffle_components(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean = points.mean(axis=0)
    scores, scale, axes = np.linalg.svd(points - mean, full_matrices=False)
    return (rng.permuted(scores, axis=0) * scale) @ axes + mean


def _cluster_layers(
    run: Extraction, images: ImageSet, layers: Layers, store: Path
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield layers, their clustered activations, float32 (tokens, hidden), and the labels."""
    layer_numbers(layers)
    calibration = calibration_tokens(recorded_model(run), images, run.config, root=store)
    sites = [site for site in calibration.sites if site.index in layers]
    wanted = {site.name: len(prefix_experts(calibration, site, run.config)) for site in sites}
    for draw in sample_tokens(calibration, run.config, wanted, hidden=True):
        yield draw.site.index, draw.hidden, cluster_tokens(draw, run.config, root=store)
