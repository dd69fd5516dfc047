"""Which expert every token of a layer goes to, and which one it counts for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moee_analysis.extraction.cluster.clustering import NOISE
from moee_analysis.extraction.cluster.clusters_to_router import Partition
from moee_analysis.extraction.record.recorded_tokens import RecordedLayer


@dataclass(frozen=True)
class Assignment:
    """The experts of leading tokens (``prefix``: that of each), then those of a ``partition``."""

    prefix: tuple[int, ...]
    partition: Partition

    @property
    def leading(self) -> int:
        """Number of experts of leading tokens."""
        return len(set(self.prefix))

    @property
    def experts(self) -> int:
        """Number of all experts."""
        return self.leading + self.partition.experts

    @property
    def kinds(self) -> np.ndarray:
        """The kind of token that each expert serves, 0 leading and 1 others, int (experts,)."""
        return (np.arange(self.experts) >= self.leading).astype(int)

    @cached_property
    def digest(self) -> str:
        """What decides the assignment of every token."""
        parts = [getattr(self.partition, name) for name in ("centres", "root", "rows", "labels")]
        digest = hashlib.sha256(repr([self.prefix, self.partition.experts]).encode())
        for part in parts:
            digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def of(self, layer: RecordedLayer) -> tuple[np.ndarray, np.ndarray]:
        """Expert of every row of the layer, and the one it counts for, -1 for none: int64."""
        sample = layer.sample
        leading = sample.position < len(self.prefix)
        own = np.array(self.prefix, dtype=np.int64)[sample.position[leading]]
        others = np.flatnonzero(~leading)
        routed = self.partition.route(sample.inputs[others])
        members = self.partition.members(routed, sample.start + others)
        found = []
        for of_others in (routed, members):
            experts = np.empty(len(sample), dtype=np.int64)
            experts[leading] = own
            experts[others] = np.where(of_others == NOISE, NOISE, of_others + self.leading)
            found.append(experts)
        return found[0], found[1]

    def alive(self, routed: np.ndarray) -> Assignment:
        """Leave out the experts of the partition that no token is routed to, of (experts,)."""
        return replace(self, partition=self.partition.select(routed[self.leading :] > 0))


def by_expert(experts: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each of ``count`` experts, ascending; those of -1 are left out."""
    order = np.argsort(experts, kind="stable")
    edges = np.searchsorted(experts[order], np.arange(count + 1))
    return [order[edges[e] : edges[e + 1]] for e in range(count)]
