"""Which tokens share an expert: clusters of a layer's tokens, and the router that follows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.clustering import NOISE, Clusters, judged, labels_of, reduce_dimensions
from moee_analysis.fisher import damped, fisher, input_root
from moee_analysis.routers import ConstantRouter, CosineRouter, nearest_in_metric
from moee_analysis.store import content_key, kept

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from moee_analysis.config import ExtractConfig
    from moee_analysis.recorded import Recorded

CHUNK = 65536


@dataclass(frozen=True)
class Partition:
    """The experts of the routed tokens of one layer, before any neuron is chosen.

    ``centres`` (experts, rank) are the mean inputs of the clusters, after ``root`` (rank, dim)
    where the router has a metric, of full rank or not; None where a single expert needs no router.
    ``routed`` is the expert of every routed row of the sample, ``members`` the expert whose
    statistics it counts for (-1: none). ``reason`` says why the layer must stay dense.
    """

    noise_share: float = 0.0
    reason: str = ""
    centres: np.ndarray | None = None
    root: np.ndarray | None = None
    routed: np.ndarray | None = None
    members: np.ndarray | None = None
    route_agreement: float = 1.0

    @property
    def experts(self) -> int:
        """Number of experts."""
        return 1 if self.centres is None else len(self.centres)

    def router(self) -> nn.Module:
        """Return a new router of the routed tokens."""
        return ConstantRouter() if self.centres is None else router_to(self.centres, self.root)


def router_to(centres: np.ndarray, root: np.ndarray | None) -> nn.Module:
    """Router to ``centres`` (experts, rank): by cosine, or to the nearest after ``root``."""
    if root is None:
        return CosineRouter(torch.from_numpy(centres))
    return nearest_in_metric(torch.from_numpy(centres), torch.from_numpy(root))


def one_expert(tokens: int) -> Partition:
    """Give all of so many tokens to a single expert: no clusters, no router."""
    everything = np.zeros(tokens, dtype=np.int64)
    return Partition(routed=everything, members=everything)


def partition(
    layer: Recorded, candidates: np.ndarray, config: ExtractConfig, *, root: Path
) -> Partition:
    """Cluster some tokens of a layer, and route all ``candidates`` (rows of its sample)."""
    rows, clusters = clustered(layer, candidates, config, root=root)
    if clusters.reason:
        return Partition(clusters.noise_share, clusters.reason)
    metric = metric_root(layer, candidates, config) if config.router == "nearest" else None
    return divided(layer, candidates, rows, clusters, noise=config.noise, root=metric)


def clustered(
    layer: Recorded, candidates: np.ndarray, config: ExtractConfig, *, root: Path
) -> tuple[np.ndarray, Clusters]:
    """Cluster a layer's tokens, or find the clusters in the store.

    Parameters
    ----------
    candidates
        Rows of the sample to draw the tokens from.

    Returns
    -------
    rows, clusters
        The rows that were clustered, and the cluster of each.
    """
    rows = _rows_to_cluster(candidates, layer, config)
    settings = config.clustering.for_width(layer.site.hidden)
    facts = {**_facts(layer, rows, config), **asdict(settings)}

    def build(folder: Path) -> None:
        points = _reduced(layer, rows, candidates, config, root=root)
        np.save(folder / "labels.npy", labels_of(points, settings, seed=config.seed))

    folder = kept(root, f"clusters-{content_key(**facts)}", build)
    return rows, judged(np.load(folder / "labels.npy"), settings)


def divided(
    layer: Recorded,
    candidates: np.ndarray,
    rows: np.ndarray,
    clusters: Clusters,
    *,
    noise: str,
    root: np.ndarray | None = None,
) -> Partition:
    """Turn clusters into experts: their centres, and the expert of every candidate.

    With a ``root``, centres are means of ``root @ x``, and the nearest one gets the token.
    """
    labels = clusters.labels
    if noise == "rest" and clusters.noise_share > 0:
        labels = np.where(labels == NOISE, clusters.count, labels)
    inputs = layer.sample.inputs
    points = inputs[rows].astype(np.float32)
    centres = _centres(points if root is None else points @ root.T, labels)
    routed = _route(router_to(centres, root), inputs, candidates)
    alive = np.unique(routed)
    renumbered = np.full(len(centres) + 1, NOISE)
    renumbered[alive] = np.arange(len(alive))
    centres, labels, routed = centres[alive], renumbered[labels], renumbered[routed]
    if len(centres) < 2:
        return Partition(clusters.noise_share, "all tokens route to one expert")
    own = np.full(len(layer.sample), NOISE)
    own[rows] = labels
    member = labels != NOISE
    found = np.searchsorted(candidates, rows)
    return Partition(
        clusters.noise_share,
        centres=centres,
        root=root,
        routed=routed,
        members=routed if noise == "reroute" else own[candidates],
        route_agreement=float(np.mean(routed[found][member] == labels[member])),
    )


def metric_root(layer: Recorded, rows: np.ndarray, config: ExtractConfig) -> np.ndarray:
    """The map after which distances of inputs are about those of outputs, float32 (rank, dim).

    Where inputs are clustered after PCA, it ends in their leading principal components, those of
    the tokens at ``rows``.
    """
    out = layer.mlp.fc2.out_features
    metric = torch.eye(out, dtype=torch.float64)
    if config.metric == "fisher":
        metric = damped(fisher(layer.sample, rows))
    whole = _unit(input_root(layer.mlp, metric))
    settings = config.clustering.for_width(layer.site.hidden)
    if settings.space == "inputs" and settings.reduce == "pca":
        whole = _leading(whole, _covariance(layer.sample.inputs, rows), settings.components)
    return whole.float().numpy()


def _leading(root: torch.Tensor, covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """``root`` followed by a projection on the ``rank`` leading components of its image."""
    components = torch.linalg.eigh(root @ covariance @ root.T).eigenvectors
    return components[:, -rank:].T @ root


def _covariance(inputs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Covariance of the tokens at ``rows``, float64 (dim, dim)."""
    products, total = 0.0, 0.0
    for start in range(0, len(rows), CHUNK):
        part = torch.from_numpy(inputs[rows[start : start + CHUNK]].astype(np.float32))
        products, total = products + (part.T @ part).double(), total + part.sum(dim=0).double()
    mean = total / len(rows)
    return products / len(rows) - torch.outer(mean, mean)


def _unit(matrix: torch.Tensor) -> torch.Tensor:
    """Scale to a mean diagonal of 1: the Fisher metric of deep layers is tiny."""
    return matrix / matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)


def _facts(layer: Recorded, rows: np.ndarray, config: ExtractConfig) -> dict[str, object]:
    """What decides the tokens to cluster and, where it matters, their metric."""
    facts = {"activations": layer.key, "site": layer.site.name, "tokens": config.tokens}
    facts["rows"] = [len(rows), int(rows.sum()), config.seed]
    if config.clustering.space == "inputs":
        facts["errors"] = config.metric  # "metric" is UMAP's
    return facts


def _rows_to_cluster(candidates: np.ndarray, layer: Recorded, config: ExtractConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, layer.site.index])
    count = min(config.cluster_tokens, len(candidates))
    return candidates[np.sort(rng.choice(len(candidates), size=count, replace=False))]


def _reduced(
    layer: Recorded, rows: np.ndarray, candidates: np.ndarray, config: ExtractConfig, *, root: Path
) -> np.ndarray:
    """Points to cluster; what UMAP, or PCA of hidden activations, makes of them is kept."""
    settings = config.clustering.for_width(layer.site.hidden)
    if settings.space == "inputs":
        to_outputs = metric_root(layer, candidates, config)
        points = layer.sample.inputs[rows].astype(np.float32) @ to_outputs.T
        if settings.reduce == "pca":  # the map ends in these components
            settings = replace(settings, reduce="none")
    else:
        points = layer.sample.hidden[rows]
    if settings.reduce == "none":
        return reduce_dimensions(points, settings)
    names = ("space", "reduce", "components", "neighbors", "epochs", "metric")
    facts = {f"umap_{name}": getattr(settings, name) for name in names}
    key = content_key(**_facts(layer, rows, config), **facts)

    def build(folder: Path) -> None:
        np.save(folder / "points.npy", reduce_dimensions(points, settings, seed=config.seed))

    return np.load(kept(root, f"reduced-{key}", build) / "points.npy")


def _centres(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean point of every cluster, float32 (clusters, dim)."""
    return np.stack([points[labels == c].mean(axis=0) for c in range(labels.max() + 1)])


def _route(router: nn.Module, inputs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Expert of the tokens at ``rows``, int64 (rows,)."""
    parts = [
        router(torch.from_numpy(inputs[rows[i : i + CHUNK]].astype(np.float32)))[:, 0].numpy()
        for i in range(0, len(rows), CHUNK)
    ]
    return np.concatenate(parts)
