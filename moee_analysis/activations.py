"""Recording what the MLPs see and do: hooks that always come off, token samples on disk."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis import models
from moee_analysis.activation_files import (
    DEFAULT,
    FILES,
    File,
    contents_of,
    create,
    opened,
    size_of,
    write,
)
from moee_analysis.errors import MoeeError
from moee_analysis.progress import progress
from moee_analysis.sensitivity import output_gradients
from moee_analysis.store import content_key, resumed, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.images import ImageSet
    from moee_analysis.models import MlpSite

BATCH = 64
GRADIENT_BATCH = 32  # a pass that can be run backward keeps every layer's activations
SAVED_EVERY = 512  # images, whole batches of them


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

    ``per_image`` None keeps every token.
    """

    per_image: int | None
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
        patches = tokens - prefix
        return prefix, patches if self.per_image is None else min(self.per_image, patches)


@dataclass(frozen=True)
class LayerSample:
    """The sampled tokens of one layer, memory-mapped; None is what was not recorded.

    ``inputs`` (rows, dim) and ``hidden`` (rows, hidden) in half precision; ``image`` and
    ``position`` say where each row comes from, ``weight`` how many tokens it stands for. The
    gradients at the MLP's outputs are ``directions`` (probes, rows, dim), unit vectors or zeros
    in half precision, times ``norms`` (probes, rows) float32.
    """

    inputs: np.ndarray
    hidden: np.ndarray | None
    image: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    directions: np.ndarray | None = None
    norms: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

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
        where = np.load(self.folder / f"tokens-{tokens}.npy")
        contents = [c for kind in self._manifest.get("kinds", DEFAULT) for c in FILES[kind]]
        mapped = {c: np.load(self.folder / f"{site.name}.{c}.npy", mmap_mode="r") for c in contents}
        whence = {field: where[field] for field in where.dtype.names}
        return LayerSample(**{"hidden": None} | mapped | whence)


def record(
    model: nn.Module,
    images: ImageSet,
    sites: Sequence[MlpSite],
    *,
    plan: TokenPlan,
    root: Path,
    kinds: Sequence[str] = DEFAULT,
    probes: int = 2,
) -> Activations:
    """Record a token sample of every site over ``images``, or find it in the store ``root``.

    The size is printed before recording starts. A recording that was killed goes on where it was
    last saved, and comes to the same bytes.

    Parameters
    ----------
    kinds
        "inputs", with or without "hidden" and "gradients".
    probes
        Gradients of each token, drawn by the plan's seed and the number of the image.

    Raises
    ------
    MoeeError
        Not enough room on the disk; values beyond half precision; kinds or probes that cannot
        be recorded, gradients of an MLP that gets windows among them.
    """
    if "inputs" not in kinds or set(kinds) - set(FILES) or probes < 1:
        raise MoeeError(
            f"inputs and others of {', '.join(FILES)}; probes >= 1", f"{kinds}; {probes} probes",
            'name them as in kinds=("inputs", "gradients"), probes=2',
        )  # fmt: skip
    ordered = tuple(kind for kind in FILES if kind in kinds)
    task = _Task(model, images, tuple(sites), plan, ordered, probes)
    key = content_key(
        model=models.fingerprint(model),
        images=images.fingerprint,
        sites=[site.name for site in sites],
        plan=[plan.per_image, plan.prefix, plan.seed],
        **task.unusual(),
    )
    return Activations(resumed(root, f"activations-{key}", partial(_record_into, task=task)), key)


def prefix_tokens(model: nn.Module) -> int:
    """Return the number of leading tokens that are no patches (CLS, distillation, registers)."""
    return int(vars(model).get("num_prefix_tokens", 0))


@dataclass(frozen=True)
class _Task:
    """All that decides a recording."""

    model: nn.Module
    images: ImageSet
    sites: tuple[MlpSite, ...]
    plan: TokenPlan
    kinds: tuple[str, ...]
    probes: int

    @property
    def gradients(self) -> bool:
        return "gradients" in self.kinds

    def unusual(self) -> dict:
        """What tells this recording from that of inputs and hidden activations."""
        kinds = {} if self.kinds == DEFAULT else {"kinds": self.kinds}
        return kinds | ({"probes": self.probes} if self.gradients else {})

    def one_row(self) -> dict[File, np.ndarray]:
        """One row of every file, all zeros: its type and shape."""
        return {(s.name, content): row for s in self.sites for content, row in self._row(s).items()}

    def _row(self, site: MlpSite) -> dict[str, np.ndarray]:
        shapes = {"inputs": (1, site.dim), "hidden": (1, site.hidden)}
        shapes["gradients"] = (1, self.probes, site.dim)
        contents = contents_of({kind: torch.zeros(shapes[kind]) for kind in self.kinds})
        return {content: row.numpy() for content, row in contents.items()}


def _record_into(folder: Path, *, task: _Task) -> None:
    done = folder / "progress.json"
    tokens = _token_counts(task.model, task.sites)
    if not done.exists():
        _create(folder, task, tokens)
        write_json(done, {"images": 0})
    _fill(folder, task)
    write_json(folder / "manifest.json", {"tokens": tokens, **task.unusual()})
    done.unlink()


def _create(folder: Path, task: _Task, tokens: dict[str, int]) -> None:
    """Say what will be written, and create it in its full size."""
    counts = {name: len(task.plan.weights(count)) for name, count in tokens.items()}
    rows = {file: len(task.images) * counts[file[0]] for file in task.one_row()}
    print(
        f"recording {len(task.sites)} layers on {len(task.images)} images, "
        f"{'/'.join(map(str, sorted(set(counts.values()))))} tokens of each: "
        f"{size_of(task.one_row(), rows) / 1e6:.0f} MB on disk"
    )
    create(folder, task.one_row(), rows)
    for count in set(tokens.values()):
        np.save(folder / f"tokens-{count}.npy", _where(task.plan, len(task.images), count))


def _token_counts(model: nn.Module, sites: Sequence[MlpSite]) -> dict[str, int]:
    device = next(model.parameters()).device
    with recording(model, sites) as captured, torch.inference_mode():
        model(torch.zeros(1, *models.input_size(model), device=device))
        return {name: seen.inputs.shape[:2].numel() for name, seen in captured.items()}


def _where(plan: TokenPlan, images: int, tokens: int) -> np.ndarray:
    """Image, position and weight of every sampled row, as one structured array."""
    weights = plan.weights(tokens)
    fields = [("image", np.int32), ("position", np.int32), ("weight", np.float32)]
    where = np.empty((images, len(weights)), dtype=fields)
    where["image"] = np.arange(images)[:, None]
    where["position"] = [plan.positions(image, tokens) for image in range(images)]
    where["weight"] = weights
    return where.reshape(-1)


def _fill(folder: Path, task: _Task) -> None:
    """Record the images that are not saved yet, and save every so many of them."""
    files = opened(folder, task.one_row())
    first = json.loads((folder / "progress.json").read_text())["images"]
    for count in _recorded(files, task, first):
        if count % SAVED_EVERY == 0 or count == len(task.images):
            for mapped in files.values():
                mapped.flush()
            write_json(folder / "progress.json", {"images": count})


def _recorded(files: dict[File, np.ndarray], task: _Task, first: int) -> Iterator[int]:
    """Record from image number ``first`` on, and yield how many there are after every batch."""
    device = next(task.model.parameters()).device
    size = GRADIENT_BATCH if task.gradients else BATCH
    label = "recording with gradients" if task.gradients else "recording"
    rest = task.images.take(range(first, len(task.images)))
    batches = rest.batches(task.model, batch_size=size)
    for batch in progress(batches, label=label, total=-(-len(rest) // size)):
        numbers = range(first, first + len(batch))
        for name, tokens in _seen(task, batch.to(device), numbers).items():
            chosen = np.stack([task.plan.positions(n, tokens["inputs"].shape[1]) for n in numbers])
            rows = {kind: _rows(tokens[kind], chosen) for kind in task.kinds}
            for content, values in contents_of(rows).items():
                write(files[name, content], values, start=first * chosen.shape[1], name=name)
        first += len(batch)
        yield first


def _seen(task: _Task, x: torch.Tensor, numbers: range) -> dict[str, dict[str, torch.Tensor]]:
    """What one pass over the images leaves at each site, by kind, (images, tokens, ...)."""
    model, sites, seeds = task.model, task.sites, [(task.plan.seed, n) for n in numbers]
    gradients = {}
    with recording(model, sites) as captured:
        if task.gradients:
            gradients = output_gradients(model, sites, x, seeds=seeds, probes=task.probes)
        else:
            with torch.inference_mode():
                model(x)
    seen = {name: {"gradients": g.permute(1, 2, 0, 3)} for name, g in gradients.items()}
    for name, tokens in captured.items():
        of_images = {k: v.reshape(len(x), -1, v.shape[-1]) for k, v in vars(tokens).items()}
        seen[name] = seen.get(name, {}) | of_images
    return seen


def _rows(tokens: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    """The rows (images * kept, ...) at positions ``chosen`` (images, kept) of the tokens."""
    index = torch.from_numpy(chosen).long().to(tokens.device)
    return torch.cat([image[kept] for image, kept in zip(tokens, index, strict=True)]).cpu()
