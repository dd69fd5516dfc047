"""Sums over all tokens: part by part, process by process, and on from where they were saved.

Whatever an extraction knows of its tokens is a sum over them. An :class:`Accumulator` says what one
layer adds up; :func:`accumulate` runs many, over several processes and kills.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.distributed import agreed, all_sum, processes, rank
from moee_analysis.utils.progress import progress, tell
from moee_analysis.utils.storage.checksums import read_signed_tensors, write_tensors
from moee_analysis.utils.storage.locks import remove
from moee_analysis.utils.storage.refusals import writing
from moee_analysis.utils.storage.store import content_key, get_or_build, present

Sums = dict[str, torch.Tensor]
Arrays = Mapping[str, np.ndarray]
Task, Key = TypeVar("Task"), TypeVar("Key")

LARGE = ("metrics",)  # arrays that stay on the disk until they are used
SAVED_AFTER = 60.0  # seconds
TINY = torch.finfo(torch.float64).tiny  # in the place of a weight of zero that is divided by


class Accumulator(ABC):
    """Sums over the tokens of a ``site``: a frozen dataclass whose compared fields decide them."""

    site: MlpSite
    gradients: bool  # whether those of the logits are needed

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums, all float64, by their names."""

    @abstractmethod
    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens to ``sums``, in place."""

    def compute(self, sums: Sums) -> Any:
        """Return what the sums over all tokens say: themselves, unless a class knows more."""
        return sums

    @property
    def facts(self) -> dict[str, str]:
        """All that decides the sums beside the tokens, as plain JSON values."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
        return {"sums": type(self).__name__} | {name: _digest(v) for name, v in own.items()}


def _digest(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return getattr(value, "digest", None) or repr(value)


def accumulate(
    tokens: TokenSource, accumulators: Sequence[Accumulator], *, label: str
) -> Iterator[tuple[MlpSite, Any]]:
    """Yield the site of every accumulator, and what it computes of all tokens of all processes.

    As many at a time are summed as the tokens' limits allow. A pass that is killed goes on where it
    was last saved, to the same bits; what took long stays saved until :func:`saved_sums` ends.
    """
    groups = groups_that_fit(accumulators, tokens.limits.memory)
    for number, group in enumerate(groups, start=1):
        of_many = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        sums = _pass(tokens, group, label + of_many)
        for accumulator in group:
            own = {name: all_sum(total) for name, total in sums.pop(0).items()}
            yield accumulator.site, accumulator.compute(own)


@contextmanager
def saved_sums(tokens: TokenSource) -> Iterator[None]:
    """While open, sums of long passes over ``tokens`` are saved; they go once all is done."""
    yield
    for path in tokens.root.glob(f"sums-{tokens.key}-*"):
        remove(path)


def size_of(accumulator: Accumulator) -> int:
    """Bytes of the sums of an accumulator."""
    return 8 * sum(math.prod(shape) for shape in accumulator.shapes.values())


def groups_that_fit(accumulators: Sequence[Accumulator], memory: float) -> list[list[Accumulator]]:
    """Divide accumulators, in order, into groups of ``memory`` bytes, at least one in each."""
    groups: list[list[Accumulator]] = []
    free = 0.0
    for accumulator in accumulators:
        if not groups or size_of(accumulator) > free:
            groups.append([])
            free = memory
        groups[-1].append(accumulator)
        free -= size_of(accumulator)
    return groups


def share_out(
    tasks: Iterable[Task],
    work: Callable[[Task], torch.Tensor],
    zeros: Callable[[Task], torch.Tensor],
) -> list[torch.Tensor]:
    """Return the results of ``work`` for all tasks, each done by one process; else ``zeros``."""
    results = [
        work(task) if number % processes() == rank() else zeros(task)
        for number, task in enumerate(tasks)
    ]
    return [all_sum(result) for result in results]


def average(
    batches: Iterable[Mapping[Key, torch.Tensor]],
    term: Callable[[Key, torch.Tensor], torch.Tensor],
    none: Mapping[Key, torch.Tensor],
) -> dict[Key, torch.Tensor]:
    """Average a ``term`` of values, its sum over images, over those of all processes, by key.

    ``batches`` are the values (images, ...) of this process, ``none`` those of no images.
    """
    images = torch.zeros((), dtype=torch.float64)
    sums = {key: term(key, values) for key, values in none.items()}
    for batch in batches:
        images += len(next(iter(batch.values())))
        for key, values in batch.items():
            sums[key] += term(key, values)
    all_sum(images)
    return {key: all_sum(total) / images for key, total in sums.items()}


def stored_arrays(
    root: Path,
    kind: str,
    facts: Mapping[str, Mapping[str, Any]],
    compute: Callable[[list[str]], Iterable[tuple[str, Arrays]]],
) -> dict[str, Arrays]:
    """Return named arrays by site name, which ``facts`` decide, from the store or ``compute``."""
    folders = {name: root / f"{kind}-{content_key(**own)}" for name, own in facts.items()}
    missing = [name for name, folder in folders.items() if not agreed(present(folder))]
    for name, arrays in compute(missing) if missing else ():

        def build(folder: Path, arrays: Arrays = arrays) -> None:
            for array, values in arrays.items():
                np.save(folder / f"{array}.npy", values)

        get_or_build(root, folders[name].name, build)
    found: dict[str, Arrays] = {}
    for name, folder in folders.items():
        modes = {path: "r" if path.stem in LARGE else None for path in folder.glob("*.npy")}
        found[name] = {path.stem: np.load(path, mode) for path, mode in modes.items()}
    return found


def _pass(tokens: TokenSource, group: Sequence[Accumulator], label: str) -> list[Sums]:
    """Sums over the tokens of this process, one pass, which goes on where it was last saved."""
    chosen = tokens.chosen
    own = [[part.start, part.stop] for part in chosen]
    key = content_key(own=own, of=[accumulator.facts for accumulator in group])
    file = tokens.root / f"sums-{tokens.key}-{key}" / "sums.safetensors"
    sums: list[Sums] = [
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in each.shapes.items()}
        for each in group
    ]
    named = {f"{n}.{name}": values for n, own in enumerate(sums) for name, values in own.items()}
    begun = saved = time.monotonic()
    done = _read_saved(file, named)
    sites = list(dict.fromkeys(accumulator.site for accumulator in group))
    gradients = any(accumulator.gradients for accumulator in group)
    parts = tokens.parts(sites, gradients=gradients, skip=done)
    steps = ((layers, *each) for layers in parts for each in zip(group, sums, strict=True))
    steps = progress(steps, label=label, total=(len(chosen) - done) * len(group))
    for taken, (layers, accumulator, own) in enumerate(steps, start=1):
        accumulator.update(own, layers[accumulator.site.name])
        if taken % len(group) == 0:
            done, now = done + 1, time.monotonic()
            since = begun if done == len(chosen) else saved  # the last ones: if all took long
            if now - since >= SAVED_AFTER:
                with writing(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(file, named, {"parts": done})
                saved = now
    return sums


def _read_saved(file: Path, sums: Sums) -> int:
    """Fill ``sums`` with those saved in ``file``, if they are whole; of how many parts they are."""
    if not file.exists():
        return 0
    try:
        tensors, facts = read_signed_tensors(file)
    except MoeeError as error:
        tell(f"saved sums are damaged, and made again: {error.found} ({file})")
        return 0
    for name, values in sums.items():
        values.copy_(tensors[name])
    return facts["parts"]
