"""Which tokens share an expert: clusters of a layer's tokens, and the router that follows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.cluster.clustering import (
    NOISE,
    Clusters,
    judged,
    labels_of,
    reduce_dimensions,
)
from moee_analysis.extraction.cluster.sample_tokens import Draw
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.record.fisher import damped, input_root
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, nearest_in_metric
from moee_analysis.utils.storage.store import content_key, kept

CHUNK = 65536


@dataclass(frozen=True)
class Partition:
    """The experts of the routed tokens of one layer, before any neuron is chosen.

    ``centres`` (experts, rank) are the mean inputs of the clusters, after ``root`` (rank, dim)
    where the router has a metric, of full rank or not; None where a single expert needs no router.
    Where the tokens do not count for the expert they are routed to, ``rows`` are the numbers of
    those that count, ascending, and ``labels`` the expert of each (-1: none). ``reason`` says why
    the layer must stay dense.
    """

    noise_share: float = 0.0
    reason: str = ""
    centres: np.ndarray | None = None
    root: np.ndarray | None = None
    rows: np.ndarray | None = None
    labels: np.ndarray | None = None
    route_agreement: float = 1.0

    @property
    def experts(self) -> int:
        """Number of experts."""
        return 1 if self.centres is None else len(self.centres)

    def router(self) -> nn.Module:
        """Return a new router of the routed tokens."""
        return ConstantRouter() if self.centres is None else router_to(self.centres, self.root)

    def routed(self, inputs: np.ndarray) -> np.ndarray:
        """Expert of every token of ``inputs`` (n, dim), int64 (n,)."""
        return _route(self.router(), inputs)

    def members(self, routed: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The expert that each token counts for, -1 for none, int64 (n,).

        ``routed`` are the experts that the tokens with the numbers ``rows`` are routed to.
        """
        if self.rows is None:
            return routed
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[place] == rows, self.labels[place], NOISE)

    def of(self, alive: np.ndarray) -> Partition:
        """Leave only the experts that are ``alive``, bool (experts,)."""
        if alive.all() or self.centres is None:
            return self
        if alive.sum() < 2:
            return Partition(self.noise_share, "all tokens route to one expert")
        number = np.append(np.where(alive, np.cumsum(alive) - 1, NOISE), NOISE)
        labels = None if self.labels is None else number[self.labels]
        return replace(self, centres=self.centres[alive], labels=labels)


def router_to(centres: np.ndarray, root: np.ndarray | None) -> nn.Module:
    """Router to ``centres`` (experts, rank): by cosine, or to the nearest after ``root``."""
    if root is None:
        return CosineRouter(torch.from_numpy(centres))
    return nearest_in_metric(torch.from_numpy(centres), torch.from_numpy(root))


def partition(draw: Draw, clusters: Clusters, config: ExtractConfig) -> Partition:
    """Turn the ``clusters`` of drawn tokens into experts, if they can be trusted."""
    if clusters.reason:
        return Partition(clusters.noise_share, clusters.reason)
    root = metric_root(draw, config) if config.router == "nearest" else None
    return divided(draw, clusters, noise=config.noise, root=root)


def divided(
    draw: Draw, clusters: Clusters, *, noise: str, root: np.ndarray | None = None
) -> Partition:
    """Turn clusters of drawn tokens into experts, and their means into a router.

    With a ``root``, centres are means of ``root @ x``, and the nearest one gets the token.
    """
    labels = clusters.labels
    if noise == "rest" and clusters.noise_share > 0:
        labels = np.where(labels == NOISE, clusters.count, labels)
    centres = _centres(draw.inputs if root is None else draw.inputs @ root.T, labels)
    found = Partition(clusters.noise_share, centres=centres, root=root)
    member = labels != NOISE
    agreement = float(np.mean(found.routed(draw.inputs[member]) == labels[member]))
    own = {} if noise == "reroute" else {"rows": draw.rows, "labels": labels}
    return replace(found, route_agreement=agreement, **own)


def clustered(draw: Draw, config: ExtractConfig, *, root: Path) -> np.ndarray:
    """Cluster of every drawn token, -1 for none, or find the labels in the store."""
    settings = config.clustering.for_width(draw.site.hidden)
    facts = {**_facts(draw, config), **asdict(settings)}

    def build(folder: Path) -> None:
        points = _reduced(draw, config, root=root)
        np.save(folder / "labels.npy", labels_of(points, settings, seed=config.seed))

    return np.load(kept(root, f"clusters-{content_key(**facts)}", build) / "labels.npy")


def trusted(labels: np.ndarray, draw: Draw, config: ExtractConfig) -> Clusters:
    """Clusters with these ``labels``, and the reason if they cannot make experts."""
    return judged(labels, config.clustering.for_width(draw.site.hidden))


def metric_root(draw: Draw, config: ExtractConfig) -> np.ndarray:
    """The map after which distances of inputs are about those of outputs, float32 (rank, dim).

    Where inputs are clustered after PCA, it ends in their leading principal components, those of
    all tokens that are drawn from.
    """
    metric = torch.eye(draw.mlp.fc2.out_features, dtype=torch.float64)
    if config.metric == "fisher":
        metric = damped(draw.fisher)
    whole = _unit(input_root(draw.mlp, metric))
    settings = config.clustering.for_width(draw.site.hidden)
    if settings.space == "inputs" and settings.reduce == "pca":
        whole = _leading(whole, draw.covariance, settings.components)
    return whole.float().numpy()


def _leading(root: torch.Tensor, covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """``root`` followed by a projection on the ``rank`` leading components of its image."""
    components = torch.linalg.eigh(root @ covariance @ root.T).eigenvectors
    return components[:, -rank:].T @ root


def _unit(matrix: torch.Tensor) -> torch.Tensor:
    """Scale to a mean diagonal of 1: the Fisher metric of deep layers is tiny."""
    return matrix / matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)


def _facts(draw: Draw, config: ExtractConfig) -> dict[str, object]:
    """What decides the tokens to cluster and, where it matters, their metric."""
    facts = {"activations": draw.key, "site": draw.site.name, "tokens": config.tokens}
    facts["rows"] = [len(draw.rows), int(draw.rows.sum()), config.seed]
    if config.clustering.space == "inputs":
        facts["errors"] = config.metric  # "metric" is UMAP's
    return facts


def _reduced(draw: Draw, config: ExtractConfig, *, root: Path) -> np.ndarray:
    """Points to cluster; what UMAP, or PCA of hidden activations, makes of them is kept."""
    settings = config.clustering.for_width(draw.site.hidden)
    if settings.space == "inputs":
        points = draw.inputs @ metric_root(draw, config).T
        if settings.reduce == "pca":  # the map ends in these components
            settings = replace(settings, reduce="none")
    else:
        points = draw.hidden
    if settings.reduce == "none":
        return reduce_dimensions(points, settings)
    names = ("space", "reduce", "components", "neighbors", "epochs", "metric")
    facts = {f"umap_{name}": getattr(settings, name) for name in names}
    key = content_key(**_facts(draw, config), **facts)

    def build(folder: Path) -> None:
        np.save(folder / "points.npy", reduce_dimensions(points, settings, seed=config.seed))

    return np.load(kept(root, f"reduced-{key}", build) / "points.npy")


def _centres(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean point of every cluster, float32 (clusters, dim)."""
    return np.stack([points[labels == c].mean(axis=0) for c in range(labels.max() + 1)])


def _route(router: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Expert of every token of ``inputs``, int64 (n,)."""
    parts = [
        router(torch.from_numpy(inputs[i : i + CHUNK].astype(np.float32)))[:, 0].numpy()
        for i in range(0, len(inputs), CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
