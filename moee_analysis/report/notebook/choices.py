"""Which layers and classes a notebook shows: given by number or name, checked against the model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models import loading as models


def checked_layers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """``layers``, if ``model`` has them.

    Raises
    ------
    MoeeError
        It does not.
    """
    count = len(models.find_mlps(model))
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise MoeeError(
            f"layers from 0 to {count - 1} of this model", str(beyond), "correct 'layers'"
        )
    return list(layers)


def class_index(model: nn.Module, wanted: int | str) -> int:
    """Index of a class of ``model``, given by index, by name (wnid) or by readable name.

    Raises
    ------
    MoeeError
        A class the model does not know.
    """
    names = models.class_names(model)
    labels = models.class_labels(model)
    if isinstance(wanted, (int, np.integer)) and 0 <= wanted < len(names):
        return int(wanted)
    for known in (names, labels):
        if wanted in known:
            return known.index(wanted)
    close = difflib.get_close_matches(str(wanted), [*labels, *names], n=3)
    raise MoeeError(
        f"one of the model's {len(names)} classes, by name or index",
        repr(wanted),
        f"did you mean {', '.join(close)}" if close else f"such as '{labels[0]}'",
    )


def liked_first(
    model: nn.Module, present: Sequence[int], preferred: Sequence[str], count: int
) -> list[int]:
    """``count`` of the classes that are ``present``, those with a ``preferred`` label first."""
    labels = models.class_labels(model)
    unique = list(dict.fromkeys(present))
    liked = [c for name in preferred for c in unique if labels[c] == name]
    return [*liked, *(c for c in unique if c not in liked)][:count]
