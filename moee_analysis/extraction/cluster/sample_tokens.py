"""The tokens of a layer that are clustered, sampled from all that are routed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.record.accumulate import Sums, summed
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.fisher import products
from moee_analysis.extraction.record.layer_tokens import Recorded
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.storage.store import content_key


@dataclass(frozen=True)
class TokenSample:
    """Sampled tokens of a layer, and statistics of all ``tokens`` they are sampled from.

    ``rows`` are their numbers among all recorded tokens, leading ones included; ``inputs``
    (n, dim) and ``hidden`` (n, hidden) are float32, hidden activations None where nobody needs
    them. ``covariance`` is that of the inputs, ``fisher`` the metric of the outputs, None without
    gradients; both float64 (dim, dim). ``key`` names the recording in the store.
    """

    site: MlpSite
    mlp: Mlp
    rows: np.ndarray
    inputs: np.ndarray
    hidden: np.ndarray | None
    tokens: int
    covariance: torch.Tensor
    fisher: torch.Tensor | None
    key: str


@dataclass(frozen=True)
class SampleTally:
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

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the sums."""
        rows = content_key(rows=self.rows.tolist())
        return {"drawn": rows, "leading": self.leading, "hidden": self.hidden}

    def add(self, sums: Sums, layer: Recorded) -> None:
        """Add a part of the tokens."""
        own = self.rows - layer.sample.start
        picked = np.flatnonzero((own >= 0) & (own < len(layer.sample)))
        for name in ("inputs", "hidden") if self.hidden else ("inputs",):
            values = np.asarray(getattr(layer.sample, name)[own[picked]], dtype=np.float64)
            sums[name][torch.from_numpy(picked)] += torch.from_numpy(values)
        for rows in layer.chunks():
            routed = np.arange(rows.start, rows.stop)[layer.sample.position[rows] >= self.leading]
            self._add_products(sums, layer, routed)

    def _add_products(self, sums: Sums, layer: Recorded, rows: np.ndarray) -> None:
        x = torch.from_numpy(layer.sample.inputs[rows].astype(np.float32))
        sums["total"] += x.sum(dim=0)
        sums["products"] += x.T @ x
        sums["tokens"] += len(rows)
        if self.gradients:
            sums["fisher"] += products(layer.sample, rows)
            sums["weight"] += float(layer.sample.weight[rows].sum(dtype=np.float64))

    def sample(self, sums: Sums, mlp: Mlp, key: str) -> TokenSample:
        """Return the sampled tokens and their statistics, from the ``sums`` of all tokens."""
        tokens = int(sums["tokens"])
        mean = sums["total"] / tokens
        return TokenSample(
            self.site,
            mlp,
            self.rows,
            sums["inputs"].float().numpy(),
            sums["hidden"].float().numpy() if self.hidden else None,
            tokens,
            sums["products"] / tokens - torch.outer(mean, mean),
            sums["fisher"] / sums["weight"] if self.gradients else None,
            key,
        )


def sample_tokens(
    calibration: Calibration, leading: Mapping[str, int], *, hidden: bool | None = None
) -> Iterator[TokenSample]:
    """Yield the tokens to cluster of some layers, as many as the configuration wants.

    Parameters
    ----------
    leading
        By the name of a layer, how many leading tokens of an image have experts of their own.
    hidden
        Whether hidden activations are sampled as well; None: where they are clustered.
    """
    config = calibration.config
    if hidden is None:
        hidden = config.clustering.space == "hidden"
    tallies = [
        SampleTally(
            site, choose_rows(calibration, site, leading[site.name]), leading[site.name],
            hidden, config.needs_gradients,
        )
        for site in calibration.sites
        if site.name in leading
    ]  # fmt: skip
    for tally, sums in summed(calibration, tallies, label="drawing tokens"):
        yield tally.sample(sums, tally.site.module(calibration.model), calibration.key)


def choose_rows(calibration: Calibration, site: MlpSite, leading: int) -> np.ndarray:
    """Numbers of the sampled tokens of a layer among all that were recorded, ascending."""
    recorded, config = calibration.kept_per_image[site.name], calibration.config
    routed = recorded - min(leading, recorded)
    tokens = routed * len(calibration.images)
    rng = np.random.default_rng([config.seed, site.index])
    chosen = rng.choice(tokens, size=min(config.cluster_tokens, tokens), replace=False)
    image, token = np.divmod(np.sort(chosen), routed)
    return image * recorded + recorded - routed + token


def pick_inputs(calibration: Calibration, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of single tokens, float32 (n, dim), by the name of a layer and their numbers."""
    tallies = [SampleTally(s, rows[s.name], 0) for s in calibration.sites if s.name in rows]
    found = summed(calibration, tallies, label="picking tokens")
    return {tally.site.name: sums["inputs"].float().numpy() for tally, sums in found}
