"""What an extraction takes of memory, told before it starts: a formula, with its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.record.calibration_set import PART, Calibration
from moee_analysis.extraction.record.layer_tokens import CHUNK
from moee_analysis.extraction.record.recording import BATCH
from moee_analysis.models.loading import MlpSite

FLOAT, DOUBLE = 4, 8  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that are held at once; none of them grows with the number of images.

    ``weights`` are those of the dense model and its copy. ``activations`` are those of a batch:
    about 8 dim + 3 hidden numbers for every token and block, where gradients are taken, and of one
    block alone where not. ``tokens`` are the inputs of clustered tokens, all that is done to a
    chunk of rows, and what is known of the tokens of one part of the images, made again or mapped
    from the disk. ``sums`` are the largest of the sums over tokens.
    """

    weights: float
    activations: float
    tokens: float
    sums: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations + self.tokens + self.sums

    def __str__(self) -> str:
        parts = {name: f"{value / 1e9:.2f} GB" for name, value in vars(self).items()}
        return (
            f"memory, at most about {self.total / 1e9:.1f} GB whatever the number of images: "
            + " + ".join(f"{name} {size}" for name, size in parts.items())
        )


def expected(calibration: Calibration) -> Memory:
    """What an extraction with this calibration takes, beside the interpreter and its libraries."""
    model, config, sites = calibration.model, calibration.config, calibration.sites
    weights = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    passing = [
        FLOAT * calibration.tokens_per_image[site.name] * (8 * site.dim + 3 * site.hidden)
        for site in sites
    ]
    kept = sum(passing) if config.needs_gradients else max(passing)
    return Memory(
        weights,
        BATCH * kept,
        sum(_clustered(site, config) for site in sites)
        + max(_chunk(site) for site in sites)
        + calibration.bytes_of(min(PART, len(calibration.images))),
        _sums(calibration),
    )


def _clustered(site: MlpSite, config: ExtractConfig) -> float:
    """Inputs of the tokens that are clustered."""
    return FLOAT * config.cluster_tokens * site.dim


def _chunk(site: MlpSite) -> float:
    """Hidden activations of some rows in three copies, or three matrices that are solved with."""
    return 3 * DOUBLE * site.hidden * max(CHUNK, site.hidden)


def _sums(calibration: Calibration) -> float:
    """The largest sums over tokens: as many layers at once as fit in the memory for them."""
    config, limit = calibration.config, calibration.limits.memory
    passes = [
        [DOUBLE * of_site(site, config) for site in calibration.sites]
        for of_site in (_drawn, _of_experts, _of_refit)
    ]
    return max(min(sum(sizes), max(limit, *sizes)) for sizes in passes)


def _drawn(site: MlpSite, config: ExtractConfig) -> int:
    """Tokens to cluster, and products of inputs and gradients."""
    hidden = site.hidden if config.clustering.space == "hidden" else 0
    return config.cluster_tokens * (site.dim + hidden) + 2 * site.dim**2


def _of_experts(site: MlpSite, config: ExtractConfig) -> int:
    """Means and squares of hidden activations, and a metric, for every expert."""
    metric = site.dim**2 if config.needs_gradients else 0
    return most_experts(site, config) * (2 * site.hidden + metric) + 2 * metric


def _of_refit(site: MlpSite, config: ExtractConfig) -> int:
    """Two products for the refit of a layer, one for the elimination in an expert."""
    if config.order == "obs" or config.refit == "each":
        return most_experts(site, config) * site.hidden**2
    return 2 * site.hidden**2 if config.refit == "shared" else 0


def most_experts(site: MlpSite, config: ExtractConfig) -> int:
    """The most experts that a layer can come to have, leading tokens' included."""
    settings = config.clustering.for_width(site.hidden)
    if config.experts == "one":
        return 2
    if settings.method == "hdbscan":
        return 2 + int(1 / settings.min_cluster_size)
    return 2 + settings.count
