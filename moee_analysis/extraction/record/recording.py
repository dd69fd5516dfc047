"""Making a recording: the model runs over images once, and sampled tokens go to disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import activation_files as files
from moee_analysis.extraction.record import recorded_tokens as samples
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite, blank
from moee_analysis.utils.progress import progress, tell_progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.locks import remove
from moee_analysis.utils.storage.store import content_key, get_or_resume

BATCH = 32  # images; a pass that can be run backward keeps every layer's activations
SAVED_EVERY = 512  # images, whole batches of them
ORIGIN = [("image", np.int32), ("position", np.int32), ("weight", np.float32)]
DEFAULT = ("inputs", "hidden")


def record(
    model: nn.Module,
    images: ImageSet,
    sites: Sequence[MlpSite],
    *,
    plan: samples.TokenPlan,
    root: Path,
    kinds: Sequence[str] = DEFAULT,
    probes: int = 2,
) -> samples.Activations:
    """Record a token sample of every site, see :class:`Recording`, or find it in a store."""
    return Recording(model, images, tuple(sites), plan, tuple(kinds), probes).to_disk(root)


@dataclass(frozen=True)
class Recording:
    """A sample of the tokens of ``sites`` on ``images``, and all that decides it.

    ``kinds`` are "inputs", with or without "hidden" and "gradients"; of the latter there are so
    many ``probes`` for each token, drawn by the plan's seed and the number of the image.
    """

    model: nn.Module
    images: ImageSet
    sites: tuple[MlpSite, ...]
    plan: samples.TokenPlan
    kinds: tuple[str, ...] = DEFAULT
    probes: int = 2

    def __post_init__(self) -> None:
        if "inputs" not in self.kinds or set(self.kinds) - set(files.CONTENTS) or self.probes < 1:
            raise MoeeError(
                f"inputs and others of {', '.join(files.CONTENTS)}; probes >= 1",
                f"{self.kinds}; {self.probes} probes",
                'name them as in kinds=("inputs", "gradients"), probes=2',
            )  # fmt: skip

    @cached_property
    def key(self) -> str:
        """Key of the recording in a store."""
        return content_key(
            recording=[site.name for site in self.sites], model=fingerprint(self.model),
            images=self.images.fingerprint, plan=[*self.plan.facts, self.plan.first],
            kinds=sorted(self.kinds), probes=self.probes if "gradients" in self.kinds else 0,
        )  # fmt: skip

    def folder(self, root: Path) -> Path:
        """Where the recording is in the store ``root`` once it is made."""
        return root / f"activations-{self.key}"

    def to_disk(self, root: Path, *, label: str = "recording") -> samples.Activations:
        """Record, or find the recording in the store ``root``; its size is told first.

        A recording that was killed goes on where it was last saved, and comes to the same bytes.
        """
        build = partial(_record_into, task=self, label=label)
        return samples.Activations(get_or_resume(root, self.folder(root).name, build), self.key)

    def in_memory(self) -> dict[str, samples.LayerSample]:
        """Record into memory alone; the sample of every site, by its name."""
        count = len(self.images)
        arrays = {
            file: np.empty((count * len(block), *block.shape[1:]), block.dtype)
            for file, block in self.blocks.items()
        }
        for _ in _record_batches(self, arrays.__getitem__):
            pass
        found = {}
        for site in self.sites:
            values = {content: arrays[site.name, content] for content in self.contents}
            origin = _origin(self.plan, count, self.tokens[site.name])
            found[site.name] = samples.layer_sample(values, origin)
        return found

    @property
    def contents(self) -> list[str]:
        """What there is a file of, for every site."""
        return [content for kind in self.kinds for content in files.CONTENTS[kind]]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """How many tokens of an image each site sees, by its name."""
        with samples.capture_mlps(self.model, self.sites) as seen, torch.inference_mode():
            self.model(blank(self.model))
        return {name: of["inputs"].shape[:2].numel() for name, of in seen.items()}

    @property
    def kept(self) -> dict[str, int]:
        """How many of them are kept."""
        return {name: len(self.plan.weights(count)) for name, count in self.tokens.items()}

    @cached_property
    def blocks(self) -> files.Blocks:
        """The rows of one image in every file, all zeros."""
        blocks = {}
        for site in self.sites:
            shapes = {"inputs": (site.dim,), "hidden": (site.hidden,)}
            shapes["gradients"] = (self.probes, site.dim)
            kept = self.kept[site.name]
            rows = {kind: torch.zeros(kept, *shapes[kind]) for kind in self.kinds}
            for content, values in files.contents_of(rows).items():
                blocks[site.name, content] = values.numpy()
        return blocks

    @property
    def bytes(self) -> int:
        """What the recording takes on disk."""
        return files.size_of(self.blocks, len(self.images))


def check_unchanged(task: Any) -> None:
    """Refuse what was made of a ``task``, with ``images`` and a ``key``, that has changed."""
    if replace(task, images=replace(task.images)).key != task.key:  # read again
        raise MoeeError(
            "images and weights that stay as they are", "some that were changed meanwhile",
            "run it again; what was there before is as it was",
        )  # fmt: skip


def _record_into(folder: Path, *, task: Recording, label: str) -> None:
    saved, images = files.SavedImages(folder, task.blocks), len(task.images)
    if not saved.resume():
        if label:
            kept = "/".join(map(str, sorted(set(task.kept.values()))))
            tell_progress(
                f"recording {len(task.sites)} layers on {images} images, "
                f"{kept} tokens of each: {task.bytes / 1e6:.0f} MB on disk"
            )
        files.create(folder, task.blocks, images)
        saved.save(0)
    array_of = partial(files.map_file, folder)
    for count in _record_batches(task, array_of, first=saved.count, label=label):
        if count % SAVED_EVERY == 0 or count == images:
            saved.save(count)
    check_unchanged(task)
    for count in set(task.tokens.values()):
        np.save(folder / f"tokens-{count}.npy", _origin(task.plan, images, count))
    write_json(folder / "manifest.json", {"tokens": task.tokens, "contents": task.contents})
    own = {f"tokens-{count}.npy" for count in task.tokens.values()} | {"manifest.json"}
    own |= {files.path_of(folder, file).name for file in task.blocks}
    for path in folder.iterdir():
        if path.name not in own:
            remove(path)


def _origin(plan: samples.TokenPlan, images: int, tokens: int) -> np.ndarray:
    """Image, position and weight of every sampled row, as one structured array."""
    weights = plan.weights(tokens)
    origin = np.empty(images * len(weights), ORIGIN)
    for number, rows in enumerate(origin.reshape(-1, len(weights)), start=plan.first):
        rows["image"], rows["weight"] = number, weights
        rows["position"] = plan.positions(number, tokens)
    return origin


def _record_batches(
    task: Recording,
    array_of: Callable[[files.File], np.ndarray],
    *,
    first: int = 0,
    label: str = "",
) -> Iterator[int]:
    """Record from the image ``first`` on, and yield how many there are after every batch."""
    rest = task.images.take(range(first, len(task.images)))
    batches = rest.batches(task.model, batch_size=BATCH)
    if label:
        label += " with gradients" if "gradients" in task.kinds else ""
        batches = progress(batches, label=label, total=-(-len(rest) // BATCH))
    for batch in batches:
        numbers = range(task.plan.first + first, task.plan.first + first + len(batch))
        for name, tokens in _seen(task, like(batch, task.model), numbers).items():
            chosen = np.stack([task.plan.positions(n, tokens["inputs"].shape[1]) for n in numbers])
            rows = {kind: _rows(tokens[kind], chosen) for kind in task.kinds}
            for content, values in files.contents_of(rows).items():
                start = first * chosen.shape[1]
                files.write_rows(array_of((name, content)), values, start=start, name=name)
        first += len(batch)
        yield first


def _seen(task: Recording, x: torch.Tensor, numbers: range) -> dict[str, dict[str, torch.Tensor]]:
    """What one pass over the images leaves at each site, by kind, (images, tokens, ...)."""
    gradients: dict[str, torch.Tensor] = {}
    with samples.capture_mlps(task.model, task.sites) as seen:
        if "gradients" in task.kinds:
            seeds = [(task.plan.seed, number) for number in numbers]
            gradients = output_gradients(task.model, task.sites, x, seeds=seeds, probes=task.probes)
        else:
            with torch.inference_mode():
                task.model(x)
    for name, values in seen.items():
        for kind, tokens in values.items():
            values[kind] = tokens.reshape(len(x), -1, tokens.shape[-1])  # windows of one image
        if name in gradients:
            values["gradients"] = gradients[name].permute(1, 2, 0, 3)
    return seen


def _rows(tokens: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
    """The rows (images * kept, ...) at positions ``chosen`` (images, kept) of the tokens."""
    index = torch.from_numpy(chosen).long().to(tokens.device)
    return torch.cat([image[kept] for image, kept in zip(tokens, index, strict=True)]).cpu()
