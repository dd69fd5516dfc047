"""The tokens of a layer that are clustered, sampled from all that are routed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.record.accumulate import Accumulator, Sums, accumulate
from moee_analysis.extraction.record.fisher import products
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite


@dataclass(frozen=True)
class TokenSample:
    """Sampled tokens of a layer, and statistics of all tokens that they are sampled from.

    ``rows`` are their numbers among all recorded tokens; ``inputs`` (n, dim) and ``hidden``
    (n, hidden), if any, are float32. ``covariance`` of the inputs and ``fisher``, the metric of the
    outputs, if any, are float64 (dim, dim). ``key`` names the recording in the store.
    """

    site: MlpSite
    rows: np.ndarray
    inputs: np.ndarray
    hidden: np.ndarray | None
    covariance: torch.Tensor
    fisher: torch.Tensor | None
    mlp: Mlp | None = None
    key: str = ""


@dataclass(frozen=True)
class SampleAccumulator(Accumulator):
    """Picks ``rows`` out of a layer, and adds up the products of all but the ``leading`` tokens."""

    site: MlpSite
    rows: np.ndarray
    leading: int
    hidden: bool = False
    gradients: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the picked tokens (n, width), and of sums of products (dim, dim)."""
        n, dim = len(self.rows), self.site.dim
        shapes = {"inputs": (n, dim), "total": (dim,), "products": (dim, dim), "tokens": ()}
        if self.hidden:
            shapes["hidden"] = (n, self.site.hidden)
        return shapes | ({"fisher": (dim, dim), "weight": ()} if self.gradients else {})

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        own = self.rows - layer.sample.start
        picked = (own >= 0) & (own < len(layer.sample))
        own, picked = own[picked], torch.from_numpy(picked)
        sums["inputs"][picked] += torch.from_numpy(layer.sample.inputs[own].astype(np.float64))
        if self.hidden:
            sums["hidden"][picked] += layer.hidden(own).cpu()
        for chunk in layer.chunks():
            rows = chunk[layer.sample.position[chunk] >= self.leading]
            x = torch.from_numpy(layer.sample.inputs[rows].astype(np.float32))
            sums["total"] += x.sum(dim=0)
            sums["products"] += x.T @ x
            sums["tokens"] += len(rows)
            if self.gradients:
                sums["fisher"] += products(layer.sample, rows)
                sums["weight"] += float(layer.sample.mass(rows).sum(dtype=np.float64))

    def compute(self, sums: Sums) -> TokenSample:
        """The sampled tokens and their statistics."""
        mean = sums["total"] / sums["tokens"]
        return TokenSample(
            self.site, self.rows, sums["inputs"].float().numpy(),
            sums["hidden"].float().numpy() if self.hidden else None,
            sums["products"] / sums["tokens"] - torch.outer(mean, mean),
            sums["fisher"] / sums["weight"] if self.gradients else None,
        )  # fmt: skip


def sample_tokens(
    tokens: TokenSource,
    config: ExtractConfig,
    leading: Mapping[str, int],
    *,
    hidden: bool | None = None,
) -> Iterator[TokenSample]:
    """Yield the tokens to cluster of some layers, as many as the configuration wants.

    ``leading`` tokens, by layer, have experts of their own; ``hidden`` None: where clustered.
    """
    hidden = config.clustering.space == "hidden" if hidden is None else hidden
    accumulators = []
    for site in (site for site in tokens.sites if site.name in leading):
        own = leading[site.name]
        rows = choose_rows(tokens, site, config, leading=own)
        accumulators.append(SampleAccumulator(site, rows, own, hidden, config.needs_gradients))
    for site, sample in accumulate(tokens, accumulators, label="drawing tokens"):
        yield replace(sample, mlp=site.module(tokens.model), key=tokens.key)


def choose_rows(
    tokens: TokenSource, site: MlpSite, config: ExtractConfig, *, leading: int
) -> np.ndarray:
    """Numbers of the sampled tokens of a layer among all that were recorded, ascending."""
    recorded = tokens.whole.kept[site.name]
    routed = recorded - min(leading, recorded)
    count = routed * len(tokens.images)
    rng = np.random.default_rng([config.seed, site.index])
    chosen = rng.choice(count, size=min(config.cluster_tokens, count), replace=False)
    image, token = np.divmod(np.sort(chosen), routed)
    return image * recorded + recorded - routed + token


def pick_inputs(tokens: TokenSource, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of single tokens, float32 (n, dim), by the name of a layer and their numbers."""
    chosen = [SampleAccumulator(s, rows[s.name], 0) for s in tokens.sites if s.name in rows]
    found = accumulate(tokens, chosen, label="picking tokens")
    return {site.name: sample.inputs for site, sample in found}
