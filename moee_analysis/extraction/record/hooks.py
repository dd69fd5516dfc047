"""Recording what the MLPs see and do: hooks that always come off, token samples on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.activation_files import DEFAULT, FILES
from moee_analysis.models.loading import MlpSite


@dataclass
class Captured:
    """What one MLP saw in the last forward pass.

    ``inputs`` is (images, tokens, dim), ``hidden`` = act(W1 x + b1) is (images, tokens, hidden);
    a grid of tokens is flattened row by row. Where a model hands an MLP the windows of an image
    one by one, these stand in the place of images.
    """

    inputs: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@contextmanager
def recording(model: nn.Module, sites: Sequence[MlpSite]) -> Iterator[dict[str, Captured]]:
    """While open, every forward pass leaves each site's activations in the yielded dict.

    The hooks come off on leaving, also after an error.
    """
    captured = {site.name: Captured() for site in sites}
    with ExitStack() as hooks:
        for site in sites:
            mlp = site.module(model)
            for layer, field in ((mlp.fc1, "inputs"), (mlp.fc2, "hidden")):
                keep = partial(_keep, captured[site.name], field)
                hooks.callback(layer.register_forward_pre_hook(keep).remove)
        yield captured


def _keep(target: Captured, field: str, _module: nn.Module, args: tuple[torch.Tensor]) -> None:
    tokens = args[0].detach()
    setattr(target, field, tokens.reshape(len(tokens), -1, tokens.shape[-1]))


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
        drawn = rng.choice(np.arange(prefix, tokens), size=count, replace=False)
        return np.concatenate([np.arange(prefix), np.sort(drawn)]).astype(np.int32)

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
        """Kept prefix tokens and kept patches; an MLP may see the prefix alone."""
        prefix = 0 if tokens in self.patches_alone else min(self.prefix, tokens)
        patches = tokens - prefix
        return prefix, patches if self.per_image is None else min(self.per_image, patches)


@dataclass(frozen=True)
class LayerSample:
    """The sampled tokens of one layer, memory-mapped; None is what was not recorded.

    ``inputs`` (rows, dim) and ``hidden`` (rows, hidden) in half precision; ``image`` and
    ``position`` say where each row comes from, ``weight`` how many tokens it stands for. The
    gradients at the MLP's outputs are ``directions`` (probes, rows, dim), unit vectors or zeros
    in half precision, times ``norms`` (probes, rows) float32. ``start`` is the number of the first
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

    def part(self, rows: slice) -> LayerSample:
        """Some consecutive rows of the sample, none of them copied."""
        values = {name: v for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        probed = ("directions", "norms")
        own = {name: v[:, rows] if name in probed else v[rows] for name, v in values.items()}
        return replace(self, **own, start=self.start + rows.start)

    def gradients(self, rows: slice | np.ndarray) -> np.ndarray:
        """Gradients of :func:`output_gradients` at ``rows``, (probes, n, dim) float32.

        Raises
        ------
        MoeeError
            They were not recorded.
        """
        if self.directions is None or self.norms is None:
            raise MoeeError(
                "a sample with gradients", "one without", 'record it with the kind "gradients"'
            )
        return self.directions[:, rows].astype(np.float32) * self.norms[:, rows, None]


@dataclass(frozen=True)
class Activations:
    """A recorded sample of activations: one :class:`LayerSample` per site name."""

    folder: Path
    key: str

    @cached_property
    def _manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    def layer(self, site: MlpSite) -> LayerSample:
        """Return the sample of ``site``, mapped from disk."""
        tokens = self._manifest["tokens"][site.name]
        where = np.load(self.folder / f"tokens-{tokens}.npy", mmap_mode="r")
        contents = [c for kind in self._manifest.get("kinds", DEFAULT) for c in FILES[kind]]
        mapped = {c: np.load(self.folder / f"{site.name}.{c}.npy", mmap_mode="r") for c in contents}
        whence = {field: where[field] for field in where.dtype.names}
        first, last = where["image"][[0, -1]]
        start = int(first) * (len(where) // int(last - first + 1))
        return LayerSample(**{"hidden": None} | mapped | whence, start=start)
