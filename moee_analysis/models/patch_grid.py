"""Where the patch tokens of an image lie: not every network has them stand row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from timm.models.hiera import Hiera
from timm.models.mobilevit import MobileVitBlock
from timm.models.nest import NestLevel
from timm.models.tnt import TNT
from torch import nn

from moee_analysis.models.loading import input_size


def patch_places(
    model: nn.Module, name: str, shape: Sequence[int], *, leading: int = 0
) -> np.ndarray:
    """Return the number of the patch at each place of a layer's grid, int64 (rows, columns).

    Patches are counted from 0 as the layer gets them, leading tokens left out. They stand row by
    row in most networks; in mask units in Hiera, by their place in a 2 x 2 patch in MobileViT, in
    blocks in NesT, pixels patch after patch in TNT. Where the places are not known, the grid is a
    single row, (1, n).

    Parameters
    ----------
    name
        Of the layer, as in ``model.named_modules()``.
    shape
        Of an image's tokens at the layer, (parts, tokens) or (parts, rows, columns): parts are
        windows that the layer gets in the place of an image, otherwise 1.
    leading
        So many tokens of each image are no patches.
    """
    numbers = np.arange(math.prod(shape) - leading)
    holders = [type(holder) for holder in _holders(model, name)]
    if Hiera in holders:
        return _rerolled(model, name, numbers)
    if MobileVitBlock in holders:
        return _unfolded(model, numbers.reshape(tuple(shape)))
    if NestLevel in holders or (TNT in holders and shape[0] > 1):
        return _in_blocks(model, numbers.reshape(shape[-2:]))
    return numbers.reshape(_sides(model, shape, len(numbers)))


def _holders(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that the module called ``name`` is in, from ``model`` on."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _rerolled(model: nn.Module, name: str, numbers: np.ndarray) -> np.ndarray:
    """Of Hiera, by its own way back to rows and columns."""
    hiera = next(holder for holder in _holders(model, name) if isinstance(holder, Hiera))
    (block,) = re.findall(r"(?:^|\.)blocks\.(\d+)\.", name)
    return hiera.reroll(torch.from_numpy(numbers)[None, :, None], int(block))[0, ..., 0].numpy()


def _unfolded(model: nn.Module, numbers: np.ndarray) -> np.ndarray:
    """Of square patches whose first tokens come first, then all second ones: (place, patch)."""
    side = math.isqrt(len(numbers))
    patches = _in_proportion(model, numbers.shape[1])
    return _woven(numbers.reshape(side, side, *patches).transpose(2, 3, 0, 1))


def _in_blocks(model: nn.Module, numbers: np.ndarray) -> np.ndarray:
    """Of blocks that come one after the other: (block, place in it)."""
    blocks, inside = (_in_proportion(model, count) for count in numbers.shape)
    return _woven(numbers.reshape(*blocks, *inside))


def _woven(numbers: np.ndarray) -> np.ndarray:
    """Put blocks (block rows, block columns, rows, columns) side by side."""
    high, wide, rows, columns = numbers.shape
    return numbers.swapaxes(1, 2).reshape(high * rows, wide * columns)


def _sides(model: nn.Module, shape: Sequence[int], patches: int) -> tuple[int, int]:
    """Rows and columns of patches that stand row by row; (1, n) where that is not known."""
    parts, *tokens = shape
    if parts != 1 or len(tokens) > 2:
        return 1, patches
    if len(tokens) == 2:
        return tokens[0], tokens[1]
    embedding = getattr(model, "patch_embed", None)
    grid = tuple(getattr(embedding, "grid_size", None) or ())
    return grid if math.prod(grid) == patches and grid else _in_proportion(model, patches)


def _in_proportion(model: nn.Module, count: int) -> tuple[int, int]:
    """Rows and columns of ``count`` tokens in proportion to the image; (1, n) if there are none."""
    _, height, width = input_size(model)
    rows = round(math.sqrt(count * height / width))
    columns = round(rows * width / height)
    return (rows, columns) if rows * columns == count else (1, count)
