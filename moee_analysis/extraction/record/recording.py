"""Making a recording: the model runs over images once, and sampled tokens go to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.activation_files import (
    DEFAULT,
    FILES,
    File,
    OnDisk,
    as_on_disk,
    contents_of,
    create,
    file_name,
    in_memory,
    size_of,
    write,
)
from moee_analysis.extraction.record.hooks import Activations, LayerSample, TokenPlan, recording
from moee_analysis.extraction.record.output_gradients import output_gradients
from moee_analysis.extraction.record.recording_progress import Whole
from moee_analysis.models import loading as models
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.progress import progress, tell_progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.locks import remove
from moee_analysis.utils.storage.store import content_key, resumed

BATCH = 32  # images; a pass that can be run backward keeps every layer's activations
SAVED_EVERY = 512  # images, whole batches of them
WHERE = [("image", np.int32), ("position", np.int32), ("weight", np.float32)]


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
        be recorded.
    """
    recording = Recording(model, images, tuple(sites), plan, tuple(kinds), probes)
    return recording.made(root, label="recording")


@dataclass(frozen=True)
class Recording:
    """All that decides a recording; :func:`record` explains it."""

    model: nn.Module
    images: ImageSet
    sites: tuple[MlpSite, ...]
    plan: TokenPlan
    kinds: tuple[str, ...] = DEFAULT
    probes: int = 2

    def __post_init__(self) -> None:
        if "inputs" not in self.kinds or set(self.kinds) - set(FILES) or self.probes < 1:
            raise MoeeError(
                f"inputs and others of {', '.join(FILES)}; probes >= 1",
                f"{self.kinds}; {self.probes} probes",
                'name them as in kinds=("inputs", "gradients"), probes=2',
            )  # fmt: skip
        object.__setattr__(self, "kinds", tuple(kind for kind in FILES if kind in self.kinds))

    @cached_property
    def key(self) -> str:
        """Key of the recording in a store."""
        plan = self.plan
        return content_key(
            model=models.fingerprint(self.model),
            images=self.images.fingerprint,
            sites=[site.name for site in self.sites],
            plan=[*plan.facts, plan.first],
            **self.unusual,
        )

    def folder(self, root: Path) -> Path:
        """Where the recording is in the store ``root`` once it is made."""
        return root / f"activations-{self.key}"

    def made(self, root: Path, *, label: str = "") -> Activations:
        """Record, or find the recording in the store ``root``; nothing is told without a label."""
        build = partial(_record_into, task=self, label=label)
        return Activations(resumed(root, self.folder(root).name, build), self.key)

    def held(self) -> dict[str, LayerSample]:
        """Record into memory alone; the sample of every site, by its name."""
        files = in_memory(self.one_row, self.rows)
        for _ in _recorded(files, self, 0, ""):
            pass
        return {site.name: self._sample(site, files) for site in self.sites}

    def _sample(self, site: MlpSite, files: Mapping[File, np.ndarray]) -> LayerSample:
        own = {file[1]: as_on_disk(file, v) for file, v in files.items() if file[0] == site.name}
        where = _where(self.plan, len(self.images), self.tokens[site.name])
        whence = {field: where[field] for field in where.dtype.names}
        start = self.plan.first * self.kept[site.name]
        return LayerSample(**{"hidden": None} | own | whence, start=start)

    @property
    def gradients(self) -> bool:
        """Whether gradients are recorded."""
        return "gradients" in self.kinds

    @property
    def unusual(self) -> dict:
        """What tells this recording from that of inputs and hidden activations."""
        kinds = {} if self.kinds == DEFAULT else {"kinds": self.kinds}
        return kinds | ({"probes": self.probes} if self.gradients else {})

    @cached_property
    def tokens(self) -> dict[str, int]:
        """How many tokens of an image each site sees, by its name."""
        with recording(self.model, self.sites) as captured, torch.inference_mode():
            self.model(models.blank(self.model))
            return {name: seen.inputs.shape[:2].numel() for name, seen in captured.items()}

    @property
    def kept(self) -> dict[str, int]:
        """How many of them are kept."""
        return {name: len(self.plan.weights(count)) for name, count in self.tokens.items()}

    @property
    def rows(self) -> dict[File, int]:
        """Rows of every file."""
        kept = self.kept
        return {file: len(self.images) * kept[file[0]] for file in self.one_row}

    @property
    def bytes(self) -> int:
        """What the recording takes on disk."""
        return size_of(self.one_row, self.rows)

    @cached_property
    def one_row(self) -> dict[File, np.ndarray]:
        """One row of every file, all zeros: its type and shape."""
        return {(s.name, content): row for s in self.sites for content, row in self._row(s).items()}

    def _row(self, site: MlpSite) -> dict[str, np.ndarray]:
        shapes = {"inputs": (1, site.dim), "hidden": (1, site.hidden)}
        shapes["gradients"] = (1, self.probes, site.dim)
        contents = contents_of({kind: torch.zeros(shapes[kind]) for kind in self.kinds})
        return {content: row.numpy() for content, row in contents.items()}


def _record_into(folder: Path, *, task: Recording, label: str) -> None:
    files = OnDisk(folder, task.one_row)
    each = {file: rows // max(len(task.images), 1) for file, rows in task.rows.items()}
    whole = Whole(folder, files, each)
    if not whole.go_on():
        if label:
            tell_progress(_what(task))
        create(folder, task.one_row, task.rows)
        whole.add(0)
    for count in _recorded(files, task, whole.images, label):
        if count % SAVED_EVERY == 0 or count == len(task.images):
            whole.add(count)
    check_unchanged(task)
    for count in set(task.tokens.values()):
        where = _where(task.plan, len(task.images), count)
        np.save(folder / f"tokens-{count}.npy", where)
    write_json(folder / "manifest.json", {"tokens": task.tokens, **task.unusual})
    _remove_others(folder, task)


def _remove_others(folder: Path, task: Recording) -> None:
    """Remove what does not belong to the recording."""
    own = {f"tokens-{count}.npy" for count in task.tokens.values()} | {"manifest.json"}
    own |= {file_name(file) for file in task.one_row}
    for path in folder.iterdir():
        if path.name not in own:
            remove(path)


def check_unchanged(task: Recording) -> None:
    """Refuse what was made of ``task`` if its images or weights are not those it began with.

    ``task`` is anything with ``images`` and a ``key``.

    Raises
    ------
    MoeeError
        They were changed meanwhile.
    """
    if replace(task, images=replace(task.images)).key != task.key:  # read again
        raise MoeeError(
            "images and weights that stay as they are", "some that were changed meanwhile",
            "run it again; what was there before is as it was",
        )  # fmt: skip


def _what(task: Recording) -> str:
    kept = "/".join(map(str, sorted(set(task.kept.values()))))
    return (
        f"recording {len(task.sites)} layers on {len(task.images)} images, "
        f"{kept} tokens of each: {task.bytes / 1e6:.0f} MB on disk"
    )


def _where(plan: TokenPlan, images: int, tokens: int) -> np.ndarray:
    """Image, position and weight of every sampled row, as one structured array."""
    weights = plan.weights(tokens)
    where = np.empty(images * len(weights), WHERE)
    for number, rows in enumerate(where.reshape(-1, len(weights)), start=plan.first):
        rows["image"], rows["weight"] = number, weights
        rows["position"] = plan.positions(number, tokens)
    return where


def _recorded(
    files: Mapping[File, np.ndarray], task: Recording, first: int, label: str
) -> Iterator[int]:
    """Record from the image ``first`` on, and yield how many there are after every batch."""
    rest = task.images.take(range(first, len(task.images)))
    batches = rest.batches(task.model, batch_size=BATCH)
    if label:
        label += " with gradients" if task.gradients else ""
        batches = progress(batches, label=label, total=-(-len(rest) // BATCH))
    for batch in batches:
        numbers = range(task.plan.first + first, task.plan.first + first + len(batch))
        for name, tokens in _seen(task, like(batch, task.model), numbers).items():
            chosen = np.stack([task.plan.positions(n, tokens["inputs"].shape[1]) for n in numbers])
            rows = {kind: _rows(tokens[kind], chosen) for kind in task.kinds}
            for content, values in contents_of(rows).items():
                write(files[name, content], values, start=first * chosen.shape[1], name=name)
        first += len(batch)
        yield first


def _seen(task: Recording, x: torch.Tensor, numbers: range) -> dict[str, dict[str, torch.Tensor]]:
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
