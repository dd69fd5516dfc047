"""Groups of experts as tensors: what a layer needs to compute its experts group by group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from moee_analysis.moe.kernels.grouping import grouped

if TYPE_CHECKING:
    from moee_analysis.moe.kernels.grouping import Group
    from moee_analysis.moe.layer import MoeMlp

FAR_BELOW = -3e4  # where activations are silent; half-way to where half precision ends
ALIGNED = 16  # neurons: torch's grouped products want rows of whole 16 bytes


@dataclass(frozen=True)
class Part:
    """A group of experts, which stand at ``start`` to ``stop`` in the order of the layout.

    ``neurons`` and ``columns`` are the ids in fc1 and fc2 of all that any of them keeps; None: of
    all there are. ``lacking`` (experts, neurons) is 0 for the neurons that an expert keeps, and
    :data:`FAR_BELOW` for those it lacks; None: 0 everywhere.
    """

    start: int
    stop: int
    neurons: torch.Tensor | None
    columns: torch.Tensor | None
    lacking: torch.Tensor | None


@dataclass(frozen=True)
class Padded:
    """Groups filled up to the same width, of neurons that none of their experts keeps.

    ``neurons`` and ``columns`` (groups, width); ``kept`` (experts, width) and ``group`` (experts,)
    of each expert in the order of the layout; ``stops`` (groups,), where the groups end in it.
    """

    neurons: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    group: torch.Tensor
    stops: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """A layer's experts in groups.

    ``order`` (experts,) has the experts of each group one after the other, ``place`` (experts,)
    says where each expert stands in it. What is made of them in inference serves training too.
    """

    layer: MoeMlp
    groups: tuple[Group, ...]
    order: torch.Tensor
    place: torch.Tensor

    @property
    def neurons(self) -> int:
        """Neurons of all groups; those that several of them have count several times."""
        return sum(len(group.neurons) for group in self.groups)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The groups one by one."""
        with torch.inference_mode(mode=False):
            return self._parts()

    @cached_property
    def padded(self) -> Padded:
        """The groups all together."""
        with torch.inference_mode(mode=False):
            return self._padded()

    def _parts(self) -> tuple[Part, ...]:
        stops = np.cumsum([0, *(len(group.experts) for group in self.groups)]).tolist()
        spans = zip(pairwise(stops), self.groups, strict=True)
        return tuple(self._part(start, stop, group) for (start, stop), group in spans)

    def _padded(self) -> Padded:
        sizes = [len(group.experts) for group in self.groups]
        most = max(1, *(len(group.neurons) for group in self.groups))
        width = -(-most // ALIGNED) * ALIGNED
        ids = np.stack([_widened(group.neurons, width) for group in self.groups])
        kept = np.concatenate([_widened(group.kept, width) for group in self.groups])
        columns = self._tensor(ids)
        return Padded(
            self._neurons(columns),
            columns,
            self._tensor(kept).to(self.layer.fc1.weight.dtype),
            self._tensor(np.repeat(np.arange(len(sizes)), sizes)),
            self._tensor(np.cumsum(sizes)),
        )

    def _part(self, start: int, stop: int, group: Group) -> Part:
        every = len(group.neurons) == self.layer.fc1.out_features and self.layer.columns is None
        columns = None if every else self._tensor(group.neurons)
        lacking = None
        if not group.kept.all():
            lacking = self._tensor(FAR_BELOW * ~group.kept).to(self.layer.fc1.weight.dtype)
        return Part(start, stop, None if every else self._neurons(columns), columns, lacking)

    def _neurons(self, columns: torch.Tensor) -> torch.Tensor:
        """The neurons whose outputs the ``columns`` weigh."""
        return columns if self.layer.columns is None else self.layer.neurons[columns]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.place.device)


def layout_of(layer: MoeMlp, count: int | None) -> Layout:
    """Arrange a layer's experts in ``count`` groups at most; None: every expert by itself."""
    kept = (layer.lacking == 0).cpu().numpy()
    shares = layer.shares.double().cpu().numpy()
    groups = grouped(kept, shares, len(kept) if count is None else count)
    order = torch.from_numpy(np.concatenate([group.experts for group in groups]))
    order = order.to(layer.fc1.weight.device)
    return Layout(layer, tuple(groups), order, order.argsort())


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """``values`` with zeros behind, up to ``width`` in the last dimension."""
    behind = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, behind)
