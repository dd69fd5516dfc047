"""What each layer can become: its clusters, its router, its ranked neurons; no size chosen yet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.activations import TokenPlan, prefix_tokens, record
from moee_analysis.clustering import NOISE, Clusters, density_labels, judged, reduce_dimensions
from moee_analysis.errors import MoeeError
from moee_analysis.models import find_mlps
from moee_analysis.progress import progress
from moee_analysis.routers import ConstantRouter, CosineRouter
from moee_analysis.selection import VarianceRanking, rank_by_variance
from moee_analysis.statistics import ExpertStatistics, statistics_of
from moee_analysis.store import content_key, kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.activations import Activations, LayerSample
    from moee_analysis.config import ExtractConfig
    from moee_analysis.images import ImageSet
    from moee_analysis.models import MlpSite


@dataclass(frozen=True)
class LayerPlan:
    """Everything known about one layer before the size of its experts is chosen.

    ``centres`` (experts, dim) are None where a single expert needs no router; ``ranking`` is None
    where the layer stays dense, for the given ``reason``.
    """

    site: MlpSite
    noise_share: float
    reason: str = ""
    centres: np.ndarray | None = None
    statistics: ExpertStatistics | None = None
    ranking: VarianceRanking | None = None
    shares: np.ndarray | None = None
    route_agreement: float = 1.0

    @property
    def converted(self) -> bool:
        """Whether this layer becomes a mixture of experts."""
        return self.ranking is not None

    def macs_per_token(self, variance_kept: float) -> float:
        """Expected MACs of one token, router included."""
        neurons = float(self.shares @ self.ranking.sizes(variance_kept))
        return self.router().macs + 2 * self.site.dim * neurons

    def router(self) -> nn.Module:
        """Return a new router of this layer."""
        if self.centres is None:
            return ConstantRouter()
        return CosineRouter(torch.from_numpy(self.centres))


def plan_layers(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> list[LayerPlan]:
    """Record, cluster and route the calibration tokens; one plan per MLP of the model."""
    wanted = _wanted(find_mlps(model), config.layers)
    activations = sampled(model, images, config, root=root)
    plans = {site.index: LayerPlan(site, 0.0, "not asked for") for site in find_mlps(model)}
    chosen = [plan.site for plan in plans.values() if plan.site.index in wanted]
    for site in progress(chosen, label="clustering layers"):
        sample = activations.layer(site)
        if config.experts == "one":
            plans[site.index] = plan_static(site, sample)
        else:
            rows, clusters = clustered(activations, site, config, root=root)
            plans[site.index] = plan_layer(site, sample, rows, clusters, noise=config.noise)
    return list(plans.values())


def sampled(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> Activations:
    """Record the tokens that ``config`` asks for, in all layers, or find them in the store."""
    tokens = TokenPlan(config.tokens_per_image, prefix_tokens(model), config.seed)
    return record(model, images, find_mlps(model), plan=tokens, root=root)


def clustered(
    activations: Activations, site: MlpSite, config: ExtractConfig, *, root: Path
) -> tuple[np.ndarray, Clusters]:
    """Cluster one layer, or find the clusters in the store.

    Returns
    -------
    rows, clusters
        The sampled rows that were clustered, and the cluster of each.
    """
    sample = activations.layer(site)
    rows = _rows_to_cluster(len(sample), site, config)
    facts = {"rows": [config.cluster_tokens, config.seed], **asdict(config.clustering)}
    key = content_key(activations=activations.key, site=site.name, **facts)

    def build(folder: Path) -> None:
        points = _reduced(activations, site, rows, config, root=root)
        np.save(folder / "labels.npy", density_labels(points, config.clustering))

    folder = kept(root, f"clusters-{key}", build)
    return rows, judged(np.load(folder / "labels.npy"), config.clustering)


def _rows_to_cluster(total: int, site: MlpSite, config: ExtractConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, site.index])
    return np.sort(rng.choice(total, size=min(config.cluster_tokens, total), replace=False))


def _reduced(
    activations: Activations, site: MlpSite, rows: np.ndarray, config: ExtractConfig, *, root: Path
) -> np.ndarray:
    """Reduce the dimensions of the rows to cluster, the slow part, or find them in the store."""
    hidden = activations.layer(site).hidden
    settings = config.clustering
    if settings.reduce == "none":
        return reduce_dimensions(hidden[rows], settings)
    names = ("reduce", "components", "neighbors", "epochs", "metric")
    facts = {name: getattr(settings, name) for name in names}
    facts["rows"] = [config.cluster_tokens, config.seed]
    key = content_key(activations=activations.key, site=site.name, **facts)

    def build(folder: Path) -> None:
        points = reduce_dimensions(hidden[rows], settings, seed=config.seed)
        np.save(folder / "points.npy", points)

    return np.load(kept(root, f"reduced-{key}", build) / "points.npy")


def plan_layer(
    site: MlpSite, sample: LayerSample, rows: np.ndarray, clusters: Clusters, *, noise: str
) -> LayerPlan:
    """Turn the clusters of one layer into experts: centres, routing and ranked neurons."""
    if clusters.reason:
        return LayerPlan(site, clusters.noise_share, clusters.reason)
    labels = clusters.labels
    if noise == "rest" and clusters.noise_share > 0:
        labels = np.where(labels == NOISE, clusters.count, labels)
    centres = _centres(sample.inputs[rows].astype(np.float32), labels)
    centres, labels, routed = _alive(centres, labels, sample)
    if len(centres) < 2:
        return LayerPlan(site, clusters.noise_share, "all tokens route to one expert")
    as_routed = statistics = statistics_of(sample, lambda part: routed[part], experts=len(centres))
    if noise != "reroute":
        own = _of_rows(labels, rows, len(sample))
        statistics = statistics_of(sample, lambda part: own[part], experts=len(centres))
    member = labels != NOISE
    return LayerPlan(
        site,
        clusters.noise_share,
        centres=centres,
        statistics=statistics,
        ranking=rank_by_variance(statistics.variance),
        shares=as_routed.shares,
        route_agreement=float(np.mean(routed[rows][member] == labels[member])),
    )


def plan_static(site: MlpSite, sample: LayerSample) -> LayerPlan:
    """Make one expert of all tokens: no clusters, no router."""
    statistics = statistics_of(sample, lambda rows: np.zeros(len(sample), int)[rows], experts=1)
    ranking = rank_by_variance(statistics.variance)
    return LayerPlan(site, 0.0, ranking=ranking, statistics=statistics, shares=np.ones(1))


def _centres(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean input of every cluster, float32 (clusters, dim)."""
    return np.stack([inputs[labels == c].mean(axis=0) for c in range(labels.max() + 1)])


def _alive(
    centres: np.ndarray, labels: np.ndarray, sample: LayerSample
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leave out experts that no token is routed to; their members become noise."""
    router = CosineRouter(torch.from_numpy(centres))
    routed = router(torch.from_numpy(sample.inputs.astype(np.float32)))[:, 0].numpy()
    alive = np.unique(routed)
    renumbered = np.full(len(centres) + 1, NOISE)
    renumbered[alive] = np.arange(len(alive))
    return centres[alive], renumbered[labels], renumbered[routed]


def _of_rows(labels: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """Labels of all sampled rows when only ``rows`` were clustered."""
    everywhere = np.full(total, NOISE)
    everywhere[rows] = labels
    return everywhere


def _wanted(sites: Sequence[MlpSite], layers: tuple[int, ...] | None) -> set[int]:
    known = {site.index for site in sites}
    wanted = known if layers is None else set(layers)
    if not wanted or wanted - known:
        raise MoeeError(
            f"layers between 0 and {len(sites) - 1}", str(sorted(wanted - known) or "none"),
            "count layers from 0, as in timm's blocks.0",
        )  # fmt: skip
    return wanted
