"""One layer as it was recorded: its tokens, its MLP, and hidden activations in any case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.extraction.record.hooks import LayerSample
from moee_analysis.models.loading import MlpSite

CHUNK = 8192  # rows whose hidden activations are in memory at once


@dataclass(frozen=True)
class Recorded:
    """A layer's MLP and some of its recorded tokens."""

    site: MlpSite
    mlp: Mlp
    sample: LayerSample

    @property
    def device(self) -> torch.device:
        """Where the MLP is, and where large products of its activations are made."""
        return self.mlp.fc1.weight.device

    def chunks(self) -> Iterator[slice]:
        """Slices of all rows, one after the other."""
        for start in range(0, len(self.sample), CHUNK):
            yield slice(start, min(start + CHUNK, len(self.sample)))


@dataclass(frozen=True)
class Recomputed:
    """Hidden activations, computed from the recorded inputs of the rows that are asked for."""

    mlp: Mlp
    inputs: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return act(W1 x + b1) at ``rows``, float32 (n, hidden)."""
        like = self.mlp.fc1.weight
        x = torch.from_numpy(self.inputs[rows].astype(np.float32)).to(like)
        with torch.no_grad():
            return self.mlp.act(self.mlp.fc1(x)).float().cpu().numpy()


def recorded_layer(sample: LayerSample, model: nn.Module, site: MlpSite) -> Recorded:
    """Return a layer's tokens; hidden activations that were not recorded are recomputed."""
    mlp = site.module(model)
    if sample.hidden is None:
        sample = replace(sample, hidden=Recomputed(mlp, sample.inputs))
    return Recorded(site, mlp, sample)
