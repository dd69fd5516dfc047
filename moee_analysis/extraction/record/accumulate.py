"""Sums over all tokens: part by part, process by process, and on from where they were saved.

Whatever an extraction knows of its tokens is a sum over them, or a few of them picked out. A
:class:`Tally` says what one layer adds up, :func:`summed` does it for many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.layer_tokens import Recorded
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.distributed import all_sum
from moee_analysis.utils.progress import progress, tell
from moee_analysis.utils.storage.checksums import read_signed_tensors, write_tensors
from moee_analysis.utils.storage.files import writing
from moee_analysis.utils.storage.locks import remove
from moee_analysis.utils.storage.store import content_key

Sums = dict[str, torch.Tensor]

SAVED_AFTER = 60.0  # seconds


class Tally(Protocol):
    """What is added up over the tokens of one layer."""

    @property
    def site(self) -> MlpSite:
        """The layer."""

    @property
    def gradients(self) -> bool:
        """Whether gradients of the logits are needed."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums, all float64, by their names."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides the sums beside the tokens, as plain JSON values."""

    def add(self, sums: Sums, layer: Recorded) -> None:
        """Add a part of the tokens to ``sums``, in place."""


def size_of(tally: Tally) -> int:
    """Bytes of the sums of a tally."""
    return 8 * sum(math.prod(shape) for shape in tally.shapes.values())


def summed(
    calibration: Calibration, tallies: Sequence[Tally], *, label: str
) -> Iterator[tuple[Tally, Sums]]:
    """Yield every tally with its sums over all tokens, of all processes.

    As many at a time are summed as fit in the calibration's memory. A pass over the tokens that
    is killed goes on where it was last saved, to the same bits; what took long stays saved until
    :func:`forget`.

    Raises
    ------
    MoeeError
        The disk has no room to save the sums, or for the tokens.
    """
    groups = that_fit(tallies, calibration.limits.memory)
    for number, group in enumerate(groups, start=1):
        of_many = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        sums = _pass(calibration, group, label + of_many)
        while group:
            yield group.pop(0), {name: all_sum(total) for name, total in sums.pop(0).items()}


def forget(calibration: Calibration) -> None:
    """Remove the sums that passes over these tokens have saved."""
    for path in calibration.root.glob(f"{_prefix(calibration)}*"):
        remove(path)


def summed_alone(tally: Tally, layer: Recorded) -> Sums:
    """Sums of a tally over the tokens of one recorded layer, all in one part."""
    sums = _zeros(tally)
    tally.add(sums, layer)
    return sums


def that_fit(tallies: Sequence[Tally], memory: float) -> list[list[Tally]]:
    """Divide tallies, in their order, into groups of ``memory`` bytes; each has one at least."""
    groups: list[list[Tally]] = []
    free = 0.0
    for tally in tallies:
        if not groups or size_of(tally) > free:
            groups.append([])
            free = memory
        groups[-1].append(tally)
        free -= size_of(tally)
    return groups


def _pass(calibration: Calibration, group: Sequence[Tally], label: str) -> list[Sums]:
    """Sums over the tokens of this process, one pass."""
    sites = {tally.site.name: tally.site for tally in group}
    saved = _Saved(_file(calibration, group))
    done, sums = saved.read(group)
    gradients = any(tally.gradients for tally in group)
    parts = calibration.parts(list(sites.values()), gradients=gradients, skip=done)
    steps = _layer_by_layer(parts, group, sums)
    total = (len(calibration.chosen) - done) * len(group)
    for taken, _ in enumerate(progress(steps, label=label, total=total), start=1):
        parts_taken, rest = divmod(taken, len(group))
        if not rest:
            number = done + parts_taken
            saved.keep(sums, number, last=number == len(calibration.chosen))
    return sums


def _layer_by_layer(
    parts: Iterator[dict[str, Recorded]], group: Sequence[Tally], sums: Sequence[Sums]
) -> Iterator[Tally]:
    """Add every layer of every part, and yield its tally: steps short enough to tell the time."""
    for layers in parts:
        for tally, total in zip(group, sums, strict=True):
            tally.add(total, layers[tally.site.name])
            yield tally


def _prefix(calibration: Calibration) -> str:
    return f"sums-{calibration.key}-"


def _file(calibration: Calibration, group: Sequence[Tally]) -> Path:
    own = [[part.start, part.stop] for part in calibration.chosen]
    facts = [{"site": tally.site.name, **tally.facts} for tally in group]
    folder = calibration.root / f"{_prefix(calibration)}{content_key(own=own, of=facts)}"
    return folder / "sums.safetensors"


def _zeros(tally: Tally) -> Sums:
    return {name: torch.zeros(s, dtype=torch.float64) for name, s in sorted(tally.shapes.items())}


@dataclass
class _Saved:
    """Sums of a pass that is under way; what is saved is whole, whenever the process dies."""

    file: Path
    begun: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def read(self, group: Sequence[Tally]) -> tuple[int, list[Sums]]:
        """How many parts are done, and their sums; none, and zeros, where none are whole."""
        sums = [_zeros(tally) for tally in group]
        if not self.file.exists():
            return 0, sums
        try:
            tensors, facts = read_signed_tensors(self.file)
        except MoeeError as error:
            tell(f"saved sums are damaged, and made again: {error.found} ({self.file})")
            return 0, sums
        for number, total in enumerate(sums):
            for name, values in total.items():
                values.copy_(tensors[f"{number}.{name}"])
        return facts["parts"], sums

    def keep(self, sums: Sequence[Sums], parts: int, *, last: bool) -> None:
        """Save the sums of so many parts, unless others were saved not long ago.

        The ``last`` ones are saved if the pass took long.
        """
        now = time.monotonic()
        if now - (self.begun if last else self.saved) >= SAVED_AFTER:
            self._write(sums, parts)
            self.saved = now

    def _write(self, sums: Sequence[Sums], parts: int) -> None:
        tensors = {f"{n}.{name}": v for n, total in enumerate(sums) for name, v in total.items()}
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file, tensors, {"parts": parts})
