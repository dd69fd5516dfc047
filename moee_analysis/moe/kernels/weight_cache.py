"""What is made of a layer's weights, kept for as long as these stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

from moee_analysis.utils.matmul import is_traced

T = TypeVar("T")


class LaidOut:
    """Weights in other orders, each made once; a copy of it, as of its layer, starts empty."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Hashable, object]] = {}

    def get(self, key: Hashable, weights: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """What ``make`` makes of the ``weights``, once for as long as they do not change.

        All changes that torch counts are seen; values written through ``.data`` are not counted.
        """
        version = _version(weights)
        if version is None:
            return make()
        found = self._made.get(key)
        if found is None or found[0] != version:
            found = self._made[key] = version, make()
        return found[1]

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[object]:
        return (made for _, made in self._made.values())

    def __reduce__(self) -> tuple[type[LaidOut], tuple[()]]:
        return LaidOut, ()


def _version(weights: Sequence[torch.Tensor]) -> Hashable | None:
    """What changes with the ``weights``; None if that cannot be told, or in training."""
    if torch.is_grad_enabled() or is_traced():
        return None
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple([(weight.data_ptr(), weight._version) for weight in weights])
