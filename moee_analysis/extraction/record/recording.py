"""Making a recording: the model runs over images once, and sampled tokens go to disk or memory.

On disk every file has its full size from the start, and is filled in turn. Checksums tell how many
images are whole there, so that a killed recording goes on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.extraction.record.tokens import LayerSample, TokenPlan, capture_mlps
from moee_analysis.models.fingerprints import fingerprint, unchanged
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite, blank
from moee_analysis.models.merging import seeing_tokens
from moee_analysis.utils.progress import progress, tell, tell_progress
from moee_analysis.utils.storage.checksums import read_signed, write_signed
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.refusals import bytes_text
from moee_analysis.utils.storage.store import content_key, get_or_resume

BATCH = 32  # images; a pass that can be run backward keeps every layer's activations
SAVED_EVERY = 512  # images, whole batches of them
PROGRESS, MANIFEST = "progress.json", "manifest.json"
ORIGIN = [("image", np.int32), ("position", np.int32), ("weight", np.float32)]
CONTENTS = {
    "inputs": ("inputs",), "hidden": ("hidden",), "gradients": ("directions", "norms"),
    "sizes": ("sizes",),
}  # fmt: skip
"""What a site's files hold, by kind of values."""


@dataclass(frozen=True)
class Recording:
    """A sample of the tokens of ``sites`` on ``images``, and all that decides it.

    ``kinds`` are some of :data:`CONTENTS`, "inputs" among them; of gradients there are so many
    ``probes`` for each token, drawn by the plan's seed and the number of the image.
    """

    model: nn.Module
    images: ImageSet
    sites: tuple[MlpSite, ...]
    plan: TokenPlan
    kinds: tuple[str, ...] = ("inputs", "hidden")
    probes: int = 2

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

    def to_disk(self, root: Path) -> Path:
        """Record into the store ``root``, find it there, or finish it; return its folder."""
        return get_or_resume(root, self.folder(root).name, partial(_record_into, task=self))

    def in_memory(self) -> dict[str, LayerSample]:
        """Record into memory alone; the sample of every site, by its name."""
        arrays = {file: block.repeat(len(self.images), 0) for file, block in self.blocks.items()}
        for _ in _record_batches(self, arrays.__getitem__):
            pass
        samples = {}
        for name, count in self.tokens.items():
            values = {content: arrays[f"{name}.{content}"] for content in self.contents}
            samples[name] = _sample(values, _origin(self.plan, len(self.images), count))
        return samples

    @property
    def contents(self) -> list[str]:
        """What there is a file of, for every site."""
        return [content for kind in self.kinds for content in CONTENTS[kind]]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """How many tokens of an image each site sees, by its name."""
        with capture_mlps(self.model, self.sites) as seen, torch.inference_mode():
            self.model(blank(self.model))
        return {name: of["inputs"].shape[:2].numel() for name, of in seen.items()}

    @property
    def kept(self) -> dict[str, int]:
        """How many of them are kept."""
        return {name: len(self.plan.weights(count)) for name, count in self.tokens.items()}

    @cached_property
    def blocks(self) -> dict[str, np.ndarray]:
        """The rows of one image in every file, all zeros, by its name."""
        blocks, kept = {}, self.kept
        for site in self.sites:
            widths = {"inputs": (site.dim,), "hidden": (site.hidden,)}
            widths |= {"directions": (self.probes, site.dim), "norms": (self.probes,), "sizes": ()}
            for content in self.contents:
                shape = (kept[site.name], *widths[content])
                dtype = np.float32 if content == "norms" else np.float16
                blocks[f"{site.name}.{content}"] = np.zeros(shape, dtype)
        return blocks

    @property
    def bytes(self) -> int:
        """What the recording takes on disk."""
        return len(self.images) * sum(block.nbytes for block in self.blocks.values())


def load_sample(folder: Path, site: MlpSite) -> LayerSample:
    """The sample of ``site``, mapped from the ``folder`` of a recording."""

    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    manifest = json.loads((folder / MANIFEST).read_text())
    values = {content: load(f"{site.name}.{content}") for content in manifest["contents"]}
    return _sample(values, load(f"tokens-{manifest['tokens'][site.name]}"))


def _sample(values: dict[str, np.ndarray], origin: np.ndarray) -> LayerSample:
    """The sample of ``values`` whose rows have an ``origin``: image, position, weight."""
    first, last = origin["image"][[0, -1]]
    start = int(first) * (len(origin) // int(last - first + 1))
    fields = {field: origin[field] for field in origin.dtype.names}
    return LayerSample(**{"hidden": None} | values | fields, start=start)


def _origin(plan: TokenPlan, images: int, tokens: int) -> np.ndarray:
    """Image, position and weight of every sampled row, as one structured array."""
    weights = plan.weights(tokens)
    origin = np.empty(images * len(weights), ORIGIN)
    for number, rows in enumerate(origin.reshape(-1, len(weights)), start=plan.first):
        rows["image"], rows["weight"] = number, weights
        rows["position"] = plan.positions(number, tokens)
    return origin


def check_unchanged(task: Any) -> None:
    """Refuse what was made of a ``task``, with ``images`` and a ``key``, that has changed."""
    with unchanged():  # the model is looked at again, and the images are read again
        changed = replace(task, images=replace(task.images)).key != task.key
    if changed:
        expected = "images and weights that stay as they are"
        hint = "run it again; what was there before is as it was"
        raise MoeeError(expected, "some that were changed meanwhile", hint)


def _record_into(folder: Path, *, task: Recording) -> None:
    saved, images = _SavedImages(folder, task.blocks), len(task.images)
    if not saved.resume():
        kept = "/".join(map(str, sorted(set(task.kept.values()))))
        told = f"recording {len(task.sites)} layers on {images} images, {kept} tokens of each"
        tell_progress(f"{told}: {task.bytes / 1e6:.0f} MB on disk")
        _create_files(folder, task)
        saved.save(0)
    array_of = partial(_map_file, folder)
    for count in _record_batches(task, array_of, first=saved.count, label="recording"):
        if count % SAVED_EVERY == 0 or count == images:
            saved.save(count)
    check_unchanged(task)
    for count in set(task.tokens.values()):
        np.save(folder / f"tokens-{count}.npy", _origin(task.plan, images, count))
    write_json(folder / MANIFEST, {"tokens": task.tokens, "contents": task.contents})
    (folder / PROGRESS).unlink()


def _record_batches(
    task: Recording, array_of: Callable[[str], np.ndarray], *, first: int = 0, label: str = ""
) -> Iterator[int]:
    """Record from the image ``first`` on, and yield how many there are after every batch."""
    rest = task.images.take(range(first, len(task.images)))
    batches = rest.batches(task.model, batch_size=BATCH)
    if label:
        label += " with gradients" if "gradients" in task.kinds else ""
        batches = progress(batches, label=label, total=-(-len(rest) // BATCH))
    for batch in batches:
        numbers = range(task.plan.first + first, task.plan.first + first + len(batch))
        for name, tokens in _run_model(task, like(batch, task.model), numbers).items():
            chosen = np.stack([task.plan.positions(n, tokens["inputs"].shape[1]) for n in numbers])
            index = torch.arange(len(batch))[:, None], torch.from_numpy(chosen).long()
            rows = {kind: tokens[kind][index].flatten(0, 1).cpu() for kind in task.kinds}
            start = first * chosen.shape[1]
            for content, values in _contents_of(rows).items():
                if not torch.isfinite(values).all():
                    expected = "activations within half precision (below 65504) and finite"
                    hint = "check the weights and the images' normalisation"
                    raise MoeeError(expected, f"larger or NaN values in {name}", hint)
                array_of(f"{name}.{content}")[start : start + len(values)] = values.numpy()
        first += len(batch)
        yield first


def _run_model(
    task: Recording, x: torch.Tensor, numbers: range
) -> dict[str, dict[str, torch.Tensor]]:
    """What one pass over the images leaves at each site, by kind, (images, tokens, ...)."""
    gradients: dict[str, torch.Tensor] = {}
    names = [site.name for site in task.sites]
    with capture_mlps(task.model, task.sites) as seen, seeing_tokens(task.model, names) as left:
        if "gradients" in task.kinds:
            seeds = [(task.plan.seed, number) for number in numbers]
            gradients = output_gradients(task.model, task.sites, x, seeds=seeds, probes=task.probes)
        else:
            with torch.inference_mode():
                task.model(x)
    for name, values in seen.items():
        for kind, tokens in values.items():
            values[kind] = tokens.reshape(len(x), -1, tokens.shape[-1])  # windows of one image
        if "sizes" in task.kinds:
            alone = values["inputs"].new_ones(values["inputs"].shape[:2])
            values["sizes"] = left[name].counted if name in left else alone
        if name in gradients:
            values["gradients"] = gradients[name].permute(1, 2, 0, 3)
    return seen


def _contents_of(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the files of one site hold of its ``rows``, by kind of values."""
    contents = {kind: values.half() for kind, values in rows.items() if kind != "gradients"}
    if "gradients" in rows:
        # Unit vectors are safe in half precision whatever the gradients' size; zeros stay zeros.
        exact = rows["gradients"].double()  # where no square of a float32 over- or underflows
        norms = torch.linalg.vector_norm(exact, dim=-1)
        directions = exact / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]
        contents |= {"norms": norms.float(), "directions": directions.float().half()}
    return contents


def _map_file(folder: Path, file: str) -> np.ndarray:
    """Map a file that was created; what is written leaves the process's memory with the array."""
    return np.lib.format.open_memmap(folder / f"{file}.npy", "r+")


def _create_files(folder: Path, task: Recording) -> None:
    """Create the files of a recording; all room is taken now, so that none lacks later."""
    try:
        free = shutil.disk_usage(folder).free
        if task.bytes > free:
            raise OSError(f"{bytes_text(free)} free")
        for file, block in task.blocks.items():
            path, rows = folder / f"{file}.npy", len(task.images) * len(block)
            mapped = np.lib.format.open_memmap(path, "w+", block.dtype, (rows, *block.shape[1:]))
            with path.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, mapped.offset + mapped.nbytes)
    except OSError as error:  # another program may be quicker, or a quota used up
        expected = f"{bytes_text(task.bytes)} of free disk for the activations"
        hint = "make room, set MOEE_STORE to another disk, or take fewer images or tokens"
        raise MoeeError(expected, f"{error} in '{folder.parent}'", hint) from None


@dataclass
class _SavedImages:
    """How many images of a recording are whole in its ``folder``; ``hashes`` are of their rows."""

    folder: Path
    blocks: Mapping[str, np.ndarray]
    count: int = 0
    hashes: dict[str, Any] = field(default_factory=dict)

    def save(self, count: int) -> None:
        """Say that there are so many images now; their rows are brought to the disk."""
        hashes = self._hash(count)
        for file in self.blocks:
            _map_file(self.folder, file).flush()
        write_signed(self.folder / PROGRESS, {"images": count, "hashes": hashes})

    def resume(self) -> bool:
        """Find the images that were saved before; whether there are any, and they are whole."""
        path = self.folder / PROGRESS
        if not path.exists():
            return False
        try:
            saved = read_signed(path)
            if self._hash(saved["images"]) == saved["hashes"]:
                return True
            damage = "other values than were saved"
        except Exception as error:  # a damaged file can break the reader in any way
            damage = getattr(error, "found", error)
        tell(f"the recording in '{self.folder}' is damaged ({damage}): it begins again")
        self.count, self.hashes = 0, {}
        return False

    def _hash(self, count: int) -> dict[str, str]:
        """Hash the rows up to those of so many images; before the first ones, the file's header."""
        for file, block in self.blocks.items():
            mapped, path = _map_file(self.folder, file), self.folder / f"{file}.npy"
            if file not in self.hashes:
                if path.stat().st_size != mapped.offset + mapped.nbytes:
                    raise ValueError(f"{path.name} has another size")
                with path.open("rb") as opened:
                    self.hashes[file] = hashlib.sha256(opened.read(mapped.offset))
            rows = slice(self.count * len(block), count * len(block))
            self.hashes[file].update(np.ascontiguousarray(mapped[rows]))
        self.count = count
        return {file: found.hexdigest() for file, found in self.hashes.items()}
