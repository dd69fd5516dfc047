"""The tokens of an image: what the leading ones are, which are kept, and what is known of each."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.loading import MlpSite, blank
from moee_analysis.models.merging import merging_blocks

CHUNK = 8192  # rows whose hidden activations are in memory at once
PREFIX_KINDS = {"cls_token": ("cls", "dist"), "dist_token": ("dist",), "reg_token": ("register",)}
"""Kinds of the tokens in timm's parameters, in order; a distilled PiT has both in one of them."""


def prefix_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the kind of every leading token, "cls", "dist" or "register", as timm orders them.

    Models with a class token for each branch (CoaT, CrossViT) have one: no layer sees more of them.
    """
    expected = vars(model).get("num_prefix_tokens")
    if expected == 0:
        return ()
    own = {  # the number of a branch is no part of a parameter's name
        re.sub(r"_token_?\d+$", "_token", name.rpartition(".")[2]): len(parameter[0])
        for name, parameter in model.named_parameters()
        if parameter.ndim > 2
    }
    kinds = []
    for name, known in PREFIX_KINDS.items():
        count = own.get(name, 0)
        kinds += (known + known[-1:] * count)[:count]  # the last kind goes on
    if expected is not None and len(kinds) != expected:
        found = f"{', '.join(kinds) or 'none'} among the parameters of {type(model).__name__}"
        hint = f"use a model whose leading tokens are timm's {', '.join(PREFIX_KINDS)}"
        raise MoeeError(f"{expected} leading tokens, as num_prefix_tokens says", found, hint)
    return tuple(kinds)


def kinds_seen(model: nn.Module, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the kinds of the leading tokens among an image's tokens of this ``shape``.

    A map (rows, columns) has none, nor have as many tokens as patches (CaiT's ``blocks``).
    No more tokens than leading ones are these alone (``blocks_token_only``).
    """
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    alone = shape[0] == patches and merging_blocks(model) is None
    if len(shape) != 1 or alone:
        return ()
    return prefix_kinds(model)[: shape[0]]


def leading_kinds(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the leading tokens that each of some layers sees, by module name.

    The model runs once. A layer that gets parts of an image (windows, the pixels of a patch) sees
    none; nothing is said of one that is called several times, or never.
    """
    if not prefix_kinds(model):
        return dict.fromkeys(names, ())
    return {name: kinds for name, (kinds, _) in _inputs(model, names).items()}


def _inputs(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Leading kinds and number of tokens that each layer called once gets of an image."""
    calls: dict[str, list[torch.Size]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name) for name in calls}
    with evaluating(model), watch(modules, lambda name, x: calls[name].append(x.shape)):
        model(blank(model))
    shapes = {name: shapes[0] for name, shapes in calls.items() if len(shapes) == 1}
    return {  # what is not one image are parts of it
        name: (kinds_seen(model, shape[1:-1]) if shape[0] == 1 else (), shape[:-1].numel())
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens of an image are kept: all prefix tokens (CLS), and ``per_image`` others or all.

    The images are numbered from ``first`` on, where they are a part of many. Layers of so many
    tokens as are in ``patches_alone`` see no prefix.
    """

    per_image: int | None
    prefix: int
    seed: int = 0
    first: int = 0
    patches_alone: frozenset[int] = frozenset()

    def positions(self, image: int, tokens: int) -> np.ndarray:
        """Return the kept positions in image number ``image`` of ``tokens`` tokens, ascending."""
        prefix, count = self._counts(tokens)
        rng = np.random.default_rng([self.seed, image, tokens])
        patches = rng.choice(np.arange(prefix, tokens), size=count, replace=False)
        return np.concatenate([np.arange(prefix), np.sort(patches)]).astype(np.int32)

    def weights(self, tokens: int) -> np.ndarray:
        """How many tokens of the image each kept one stands for."""
        prefix, count = self._counts(tokens)
        return np.repeat([1, (tokens - prefix) / max(count, 1)], [prefix, count])

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


def token_plan(
    model: nn.Module, names: Iterable[str], per_image: int | None, *, seed: int = 0
) -> TokenPlan:
    """Plan to keep all leading tokens and ``per_image`` patches (None: all) at some layers."""
    prefix = len(prefix_kinds(model))
    inputs = _inputs(model, names).values() if prefix else ()
    alone = frozenset(tokens for kinds, tokens in inputs if not kinds)
    return TokenPlan(per_image, prefix, seed, patches_alone=alone)


@contextmanager
def capture_mlps(
    model: nn.Module, sites: Sequence[MlpSite]
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """While open, yield what the sites saw in the latest forward pass, by name and kind.

    ``inputs`` (images or windows, tokens, dim), ``hidden`` = act(W1 x + b1); grids row by row.
    """
    seen: dict[str, dict[str, torch.Tensor]] = {site.name: {} for site in sites}

    def keep(key: tuple[str, str], value: torch.Tensor) -> None:
        seen[key[0]][key[1]] = value.detach().reshape(len(value), -1, value.shape[-1])

    kinds = {"inputs": "fc1", "hidden": "fc2"}
    layers = {(s.name, k): getattr(s.module(model), fc) for s in sites for k, fc in kinds.items()}
    with watch(layers, keep):
        yield seen


@dataclass(frozen=True)
class LayerSample:
    """The sampled tokens of one layer, memory-mapped or not; None is what was not recorded.

    ``inputs`` (rows, dim) and ``hidden`` (rows, hidden) are in half precision; a row stands for
    ``weight`` tokens. Gradients are ``directions`` (rows, probes, dim), unit vectors or zeros in
    half precision, times ``norms`` (rows, probes) float32. Where tokens merge, a token stands for
    ``sizes`` (rows,) of those there were at first. The first row has the number ``start``.
    """

    inputs: np.ndarray
    hidden: np.ndarray | None
    image: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    directions: np.ndarray | None = None
    norms: np.ndarray | None = None
    sizes: np.ndarray | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """How many of the first tokens ``rows`` stand for, float32 (n,)."""
        sizes = 1 if self.sizes is None else self.sizes[rows].astype(np.float32)
        return self.weight[rows] * sizes

    def part(self, rows: slice) -> Self:
        """Some consecutive rows of the sample, none of them copied."""
        own = {name: v[rows] for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **own, start=self.start + rows.start)

    def gradients(self, rows: slice | np.ndarray) -> np.ndarray:
        """Gradients of :func:`output_gradients` at ``rows``, (probes, n, dim) float32."""
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

    def chunks(self, rows: np.ndarray | None = None, *, size: int = 0) -> Iterator[np.ndarray]:
        """Numbers of all rows, or of some ``rows``, so many at a time (0: :data:`CHUNK`)."""
        rows, size = (np.arange(len(self.sample)) if rows is None else rows), size or CHUNK
        return (rows[start : start + size] for start in range(0, len(rows), size))
