"""When clusters are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether labels differ by their numbers alone, and noise, -1, not at all."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    same_noise = all((a == -1) == (b == -1) for a, b in pairs)
    return same_noise and len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
