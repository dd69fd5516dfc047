"""Sampled tokens of MLPs: which are kept of every image, and what is known of each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import MlpSite

CHUNK = 8192  # rows whose hidden activations are in memory at once


@contextmanager
def capture_mlps(
    model: nn.Module, sites: Sequence[MlpSite]
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """While open, yield what the sites saw in the latest forward pass, by name and kind.

    ``inputs`` are (images, tokens, dim), ``hidden`` = act(W1 x + b1) are (images, tokens, hidden);
    grids of tokens are flattened row by row. Windows may stand in the place of images.
    """
    seen: dict[str, dict[str, torch.Tensor]] = {site.name: {} for site in sites}

    def keep(key: tuple[str, str], value: torch.Tensor) -> None:
        seen[key[0]][key[1]] = value.detach().reshape(len(value), -1, value.shape[-1])

    kinds = {"inputs": "fc1", "hidden": "fc2"}
    layers = {(s.name, k): getattr(s.module(model), fc) for s in sites for k, fc in kinds.items()}
    with watch(layers, keep):
        yield seen


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens of an image are kept: all prefix tokens (CLS) and ``per_image`` others.

    ``per_image`` None keeps every token. The images are numbered from ``first`` on, where they are
    a part of many. Layers of so many tokens as are in ``patches_alone`` see no prefix.
    """

    per_image: int | None
    prefix: int
    seed: int = 0
    first: int = 0
    patches_alone: frozenset[int] = frozenset()

    def positions(self, image: int, tokens: int) -> np.ndarray:
        """Return the kept positions in image number ``image`` of ``tokens`` tokens, ascending."""
        rng = np.random.default_rng([self.seed, image, tokens])
        prefix, count = self._counts(tokens)
        patches = rng.choice(np.arange(prefix, tokens), size=count, replace=False)
        return np.concatenate([np.arange(prefix), np.sort(patches)]).astype(np.int32)

    def weights(self, tokens: int) -> np.ndarray:
        """How many tokens of the image each kept one stands for."""
        prefix, count = self._counts(tokens)
        patches = np.full(count, (tokens - prefix) / max(count, 1))
        return np.concatenate([np.ones(prefix), patches])

    @property
    def facts(self) -> list[int | list[int] | None]:
        """What decides the tokens, apart from the number of the first image."""
        alone = [sorted(self.patches_alone)] if self.patches_alone else []
        return [self.per_image, self.prefix, self.seed, *alone]

    def _counts(self, tokens: int) -> tuple[int, int]:
        """Kept prefix tokens and kept patches."""
        prefix = 0 if tokens in self.patches_alone else min(self.prefix, tokens)
        patches = tokens - prefix
        return prefix, patches if self.per_image is None else min(self.per_image, patches)


@dataclass(frozen=True)
class LayerSample:
    """The sampled tokens of one layer, memory-mapped or not; None is what was not recorded.

    ``inputs`` (rows, dim) and ``hidden`` (rows, hidden) in half precision; ``image`` and
    ``position`` say where each row comes from, ``weight`` how many tokens it stands for. The
    gradients at the MLP's outputs are ``directions`` (rows, probes, dim), unit vectors or zeros
    in half precision, times ``norms`` (rows, probes) float32. ``start`` is the number of the first
    row among those of all images.
    """

    inputs: np.ndarray
    hidden: np.ndarray | None
    image: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    directions: np.ndarray | None = None
    norms: np.ndarray | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, rows: slice) -> Self:
        """Some consecutive rows of the sample, none of them copied."""
        own = {name: v[rows] for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **own, start=self.start + rows.start)

    def gradients(self, rows: slice | np.ndarray) -> np.ndarray:
        """Gradients of :func:`output_gradients` at ``rows``, (probes, n, dim) float32."""
        if self.directions is None or self.norms is None:
            raise MoeeError(
                "a sample with gradients", "one without", 'record it with the kind "gradients"'
            )
        gradients = self.directions[rows].astype(np.float32) * self.norms[rows, :, None]
        return np.ascontiguousarray(gradients.swapaxes(0, 1))


@dataclass(frozen=True)
class RecordedLayer:
    """A layer's MLP and some of its sampled tokens, on the device of the MLP."""

    site: MlpSite
    mlp: Mlp
    sample: LayerSample

    @property
    def device(self) -> torch.device:
        """Where the MLP is, and where large products of its activations are made."""
        return self.mlp.fc1.weight.device

    @torch.no_grad()
    def hidden(self, rows: slice | np.ndarray) -> torch.Tensor:
        """Hidden activations at ``rows``, float32 (n, hidden), recorded or computed again."""
        if self.sample.hidden is not None:
            values = np.asarray(self.sample.hidden[rows], dtype=np.float32)
            return torch.from_numpy(values).to(self.device)
        x = torch.from_numpy(self.sample.inputs[rows].astype(np.float32))
        return self.mlp.act(self.mlp.fc1(x.to(self.mlp.fc1.weight))).float()

    def chunks(self, rows: np.ndarray | None = None, *, size: int = CHUNK) -> Iterator[np.ndarray]:
        """Numbers of all rows, or of some ``rows``, so many at a time."""
        rows = np.arange(len(self.sample)) if rows is None else rows
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
