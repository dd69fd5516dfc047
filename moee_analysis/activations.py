"""Recording what the MLPs see and do: hooks that always come off, token samples on disk."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis import models
from moee_analysis.errors import MoeeError
from moee_analysis.progress import progress
from moee_analysis.store import content_key, kept, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.images import ImageSet
    from moee_analysis.models import MlpSite

BATCH = 64


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
    handles = []
    try:
        for site in sites:
            mlp, target = site.module(model), captured[site.name]
            handles.append(mlp.fc1.register_forward_pre_hook(partial(_keep, target, "inputs")))
            handles.append(mlp.fc2.register_forward_pre_hook(partial(_keep, target, "hidden")))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _keep(target: Captured, field: str, _module: nn.Module, args: tuple[torch.Tensor]) -> None:
    tokens = args[0].detach()
    setattr(target, field, tokens.reshape(len(tokens), -1, tokens.shape[-1]))


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens of an image are kept: all prefix tokens (CLS) and ``per_image`` others."""

    per_image: int
    prefix: int
    seed: int = 0

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

    def _counts(self, tokens: int) -> tuple[int, int]:
        """Kept prefix tokens and kept patches; an MLP may see the prefix alone."""
        prefix = min(self.prefix, tokens)
        return prefix, min(self.per_image, tokens - prefix)


@dataclass(frozen=True)
class LayerSample:
    """The sampled tokens of one layer, half precision, memory-mapped.

    ``inputs`` (rows, dim), ``hidden`` (rows, hidden); ``image`` and ``position`` say where each
    row comes from, ``weight`` how many tokens it stands for.
    """

    inputs: np.ndarray
    hidden: np.ndarray
    image: np.ndarray
    position: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


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
        where = np.load(self.folder / f"tokens-{tokens}.npy")
        mapped = (
            np.load(self.folder / f"{site.name}.{kind}.npy", mmap_mode="r")
            for kind in ("inputs", "hidden")
        )
        return LayerSample(
            *mapped,
            image=where["image"],
            position=where["position"],
            weight=where["weight"],
        )


def record(
    model: nn.Module,
    images: ImageSet,
    sites: Sequence[MlpSite],
    *,
    plan: TokenPlan,
    root: Path,
) -> Activations:
    """Record a token sample of every site over ``images``, or find it in the store ``root``.

    The size is printed before recording starts.

    Raises
    ------
    MoeeError
        Not enough room on the disk; activations beyond the range of half precision.
    """
    key = content_key(
        model=models.fingerprint(model),
        images=images.fingerprint,
        sites=[site.name for site in sites],
        plan=[plan.per_image, plan.prefix, plan.seed],
    )
    build = partial(_record_into, model=model, images=images, sites=sites, plan=plan)
    return Activations(kept(root, f"activations-{key}", build), key)


def prefix_tokens(model: nn.Module) -> int:
    """Return the number of leading tokens that are no patches (CLS, distillation, registers)."""
    return int(vars(model).get("num_prefix_tokens", 0))


def _record_into(
    folder: Path,
    *,
    model: nn.Module,
    images: ImageSet,
    sites: Sequence[MlpSite],
    plan: TokenPlan,
) -> None:
    tokens = _token_counts(model, sites)
    kept_tokens = {name: len(plan.weights(count)) for name, count in tokens.items()}
    _announce(folder, images, sites, kept_tokens)
    files = _open_files(folder, len(images), sites, kept_tokens)
    for count in set(tokens.values()):
        np.save(folder / f"tokens-{count}.npy", _where(plan, len(images), count))
    with recording(model, sites) as captured:
        _fill(files, captured, model=model, images=images, plan=plan)
    for mapped in files.values():
        mapped.flush()
    write_json(folder / "manifest.json", {"tokens": tokens})


def _token_counts(model: nn.Module, sites: Sequence[MlpSite]) -> dict[str, int]:
    device = next(model.parameters()).device
    with recording(model, sites) as captured, torch.inference_mode():
        model(torch.zeros(1, *models.input_size(model), device=device))
        return {name: seen.inputs.shape[:2].numel() for name, seen in captured.items()}


def _announce(
    folder: Path, images: ImageSet, sites: Sequence[MlpSite], kept_tokens: dict[str, int]
) -> None:
    size = sum(2 * len(images) * kept_tokens[s.name] * (s.dim + s.hidden) for s in sites)
    free = shutil.disk_usage(folder).free
    tokens = sorted(set(kept_tokens.values()))
    print(
        f"recording {len(sites)} layers on {len(images)} images, "
        f"{'/'.join(map(str, tokens))} tokens of each: {size / 1e6:.0f} MB on disk"
    )
    if size > free:
        raise MoeeError(
            f"{size / 1e6:.0f} MB of free disk for the activations", f"{free / 1e6:.0f} MB",
            "make room, set MOEE_STORE to another disk, or take fewer images or tokens",
        )  # fmt: skip


def _open_files(
    folder: Path, images: int, sites: Sequence[MlpSite], kept_tokens: dict[str, int]
) -> dict[tuple[str, str], np.memmap]:
    return {
        (site.name, kind): np.lib.format.open_memmap(
            folder / f"{site.name}.{kind}.npy",
            mode="w+",
            dtype=np.float16,
            shape=(images * kept_tokens[site.name], width),
        )
        for site in sites
        for kind, width in (("inputs", site.dim), ("hidden", site.hidden))
    }


def _where(plan: TokenPlan, images: int, tokens: int) -> np.ndarray:
    """Image, position and weight of every sampled row, as one structured array."""
    weights = plan.weights(tokens)
    fields = [("image", np.int32), ("position", np.int32), ("weight", np.float32)]
    where = np.empty((images, len(weights)), dtype=fields)
    where["image"] = np.arange(images)[:, None]
    where["position"] = [plan.positions(image, tokens) for image in range(images)]
    where["weight"] = weights
    return where.reshape(-1)


def _fill(
    files: dict[tuple[str, str], np.memmap],
    captured: dict[str, Captured],
    *,
    model: nn.Module,
    images: ImageSet,
    plan: TokenPlan,
) -> None:
    device = next(model.parameters()).device
    batches = images.batches(model, batch_size=BATCH)
    first = 0
    for batch in progress(batches, label="recording", total=-(-len(images) // BATCH)):
        with torch.inference_mode():
            model(batch.to(device))
        for (name, kind), file in files.items():
            tokens = getattr(captured[name], kind)
            of_images = tokens.reshape(len(batch), -1, tokens.shape[-1])
            _write_rows(file, of_images, plan, first=first, name=name)
        first += len(batch)


def _write_rows(
    file: np.memmap, tokens: torch.Tensor, plan: TokenPlan, *, first: int, name: str
) -> None:
    count = tokens.shape[1]
    chosen = np.stack([plan.positions(first + i, count) for i in range(len(tokens))])
    index = torch.from_numpy(chosen).long().to(tokens.device)
    rows = torch.take_along_dim(tokens, index[:, :, None], dim=1).half().cpu()
    if not torch.isfinite(rows).all():
        raise MoeeError(
            "activations within half precision (below 65504) and finite",
            f"larger or NaN values in {name}",
            "check the weights and the images' normalisation",
        )
    start = first * chosen.shape[1]
    file[start : start + chosen.size] = rows.reshape(chosen.size, -1).numpy()
