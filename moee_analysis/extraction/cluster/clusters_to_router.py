"""Which tokens share an expert: clusters of a layer's tokens, and the router that follows them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.cluster.clustering import NOISE, assess, label, reduce_dimensions
from moee_analysis.extraction.cluster.sample_tokens import TokenSample
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.record.fisher import damp, input_root
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, nearest_in_metric
from moee_analysis.utils.storage.store import content_key, get_or_build

CHUNK = 65536


@dataclass(frozen=True)
class Partition:
    """The experts of the routed tokens of one layer, before any neuron is chosen.

    ``centres`` (experts, rank) are the mean inputs of the clusters, after ``root`` (rank, dim)
    where the router has a metric; None for a single expert. Where tokens do not count for the
    expert they are routed to, ``rows`` are the numbers of those that count, ascending, and
    ``labels`` the expert of each (-1: none). ``reason``: why the layer stays dense.
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
        """Return a new router of the routed tokens: by cosine, or to the nearest after ``root``."""
        if self.centres is None:
            return ConstantRouter()
        centres = torch.from_numpy(self.centres)
        if self.root is None:
            return CosineRouter(centres)
        return nearest_in_metric(centres, torch.from_numpy(self.root))

    def route(self, inputs: np.ndarray) -> np.ndarray:
        """Expert of every token of ``inputs`` (n, dim), int64 (n,)."""
        router, chunks = self.router(), torch.from_numpy(inputs).split(CHUNK)
        return torch.cat([router(x.float())[:, 0] for x in chunks]).numpy()


def cluster_tokens(sample: TokenSample, config: ExtractConfig, *, root: Path) -> np.ndarray:
    """Cluster of every sampled token, -1 for none, made once and found again in the store."""
    clustering = config.clustering.for_width(sample.site.hidden)
    facts = {  # what decides the tokens and, where it matters, their metric
        "activations": sample.key, "site": sample.site.name, "tokens": config.tokens,
        "rows": [len(sample.rows), int(sample.rows.sum()), config.seed],
        **({"metric": config.metric} if clustering.space == "inputs" else {}),
    }  # fmt: skip

    def build(folder: Path) -> None:
        points = _points(sample, config, facts, root=root)
        np.save(folder / "labels.npy", label(points, clustering, seed=config.seed))

    key = content_key(**facts, **asdict(clustering))
    return np.load(get_or_build(root, f"clusters-{key}", build) / "labels.npy")


def _points(
    sample: TokenSample, config: ExtractConfig, facts: Mapping[str, Any], *, root: Path
) -> np.ndarray:
    """Points to cluster; a UMAP, or a PCA of hidden activations, is found again in the store."""
    clustering, points = config.clustering.for_width(sample.site.hidden), sample.hidden
    if clustering.space == "inputs":
        points = sample.inputs @ metric_root(sample, config).T
        if clustering.reduce == "pca":  # the map ends in these components
            clustering = replace(clustering, reduce="none")
    if clustering.reduce == "none":
        return reduce_dimensions(points, clustering)

    def build(folder: Path) -> None:
        np.save(folder / "points.npy", reduce_dimensions(points, clustering, seed=config.seed))

    names = ("space", "reduce", "components", "neighbors", "epochs")
    key = content_key(**facts, **{f"umap_{name}": getattr(clustering, name) for name in names})
    return np.load(get_or_build(root, f"reduced-{key}", build) / "points.npy")


def partition_tokens(sample: TokenSample, labels: np.ndarray, config: ExtractConfig) -> Partition:
    """Turn clusters of sampled tokens, if they can be trusted, into experts and a router."""
    clusters = assess(labels, config.clustering)
    if clusters.reason:
        return Partition(clusters.noise_share, clusters.reason)
    if config.noise == "rest" and clusters.noise_share > 0:
        labels = np.where(labels == NOISE, clusters.count, labels)
    root = metric_root(sample, config) if config.router == "nearest" else None
    points = sample.inputs if root is None else sample.inputs @ root.T
    centres = np.stack([points[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    found = Partition(clusters.noise_share, centres=centres, root=root)
    member = labels != NOISE
    agreement = float(np.mean(found.route(sample.inputs[member]) == labels[member]))
    own = {} if config.noise == "reroute" else {"rows": sample.rows, "labels": labels}
    return replace(found, route_agreement=agreement, **own)


def metric_root(sample: TokenSample, config: ExtractConfig) -> np.ndarray:
    """The map after which distances of inputs are about those of outputs, float32 (rank, dim).

    Where inputs are clustered after PCA, it ends in all tokens' leading principal components.
    """
    metric = torch.eye(sample.mlp.fc2.out_features, dtype=torch.float64)
    if config.metric == "fisher":
        metric = damp(sample.fisher)
    root = input_root(sample.mlp, metric)
    # The Fisher metric of deep layers is tiny: scale to a mean diagonal of 1.
    root = root / root.diagonal().mean().clamp_min(torch.finfo(root.dtype).tiny)
    clustering = config.clustering.for_width(sample.site.hidden)
    if clustering.space == "inputs" and clustering.reduce == "pca":
        components = torch.linalg.eigh(root @ sample.covariance @ root.T).eigenvectors
        root = components[:, -clustering.components :].T @ root
    return root.float().numpy()


@dataclass(frozen=True)
class Assignment:
    """The experts of leading tokens (``prefix``: that of each), then those of a ``partition``."""

    prefix: tuple[int, ...]
    partition: Partition

    @property
    def leading(self) -> int:
        """Number of experts of leading tokens."""
        return len(set(self.prefix))

    @property
    def experts(self) -> int:
        """Number of all experts."""
        return self.leading + self.partition.experts

    @property
    def kinds(self) -> np.ndarray:
        """The kind of token that each expert serves, 0 leading and 1 others, int (experts,)."""
        return (np.arange(self.experts) >= self.leading).astype(int)

    @cached_property
    def digest(self) -> str:
        """What decides the assignment of every token."""
        own = self.partition
        digest = hashlib.sha256(repr([self.prefix, own.experts]).encode())
        for part in (own.centres, own.root, own.rows, own.labels):
            digest.update(b"none" if part is None else part.tobytes())
        return digest.hexdigest()

    def of(self, layer: RecordedLayer) -> tuple[np.ndarray, np.ndarray]:
        """Expert of every row of the layer, and the one it counts for, -1 for none: int64."""
        sample, own = layer.sample, self.partition
        leading = sample.position < len(self.prefix)
        others = np.flatnonzero(~leading)
        routed = members = own.route(sample.inputs[others])
        if own.rows is not None:
            numbers = sample.start + others
            place = np.minimum(np.searchsorted(own.rows, numbers), len(own.rows) - 1)
            members = np.where(own.rows[place] == numbers, own.labels[place], NOISE)
        both = np.stack([routed, members])
        found = np.empty((2, len(sample)), dtype=np.int64)
        found[:, leading] = np.array(self.prefix, dtype=np.int64)[sample.position[leading]]
        found[:, others] = np.where(both == NOISE, NOISE, both + self.leading)
        return found[0], found[1]

    def alive(self, routed: np.ndarray) -> Self:
        """Leave out the experts of the partition that no token is ``routed`` to, (experts,)."""
        own, alive = self.partition, routed[self.leading :] > 0
        if alive.all() or own.centres is None:
            return self
        number = np.append(np.where(alive, np.cumsum(alive) - 1, NOISE), NOISE)
        labels = None if own.labels is None else number[own.labels]
        left = replace(own, centres=own.centres[alive], labels=labels)
        if alive.sum() < 2:
            left = Partition(own.noise_share, "all tokens route to one expert")
        return replace(self, partition=left)


def by_expert(experts: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each of ``count`` experts, ascending; those of -1 are left out."""
    order = np.argsort(experts, kind="stable")
    edges = np.searchsorted(experts[order], np.arange(count + 1))
    return [order[start:end] for start, end in pairwise(edges)]
