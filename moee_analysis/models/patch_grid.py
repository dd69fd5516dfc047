"""Where the patch tokens of an image lie: not every network has them stand row by row."""

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

from moee_analysis.models.inputs import input_size


def patch_places(
    model: nn.Module, name: str, shape: Sequence[int], *, leading: int = 0
) -> np.ndarray:
    """Return the number of the patch at each place of a layer's grid, int64 (rows, columns).

    Patches are counted from 0 as the layer gets them, without the ``leading`` tokens, in most
    networks row by row. Where the places are not known, the grid is a single row, (1, n). ``name``
    is the layer's in ``model``, ``shape`` that of an image's tokens there, (parts, tokens) or
    (parts, rows, columns): parts are windows that it gets in the place of an image, otherwise 1.
    """
    numbers = np.arange(math.prod(shape) - leading)
    parts = name.split(".")
    within = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    holders = {type(holder): holder for holder in within}
    if Hiera in holders:  # in mask units: by its own way back to rows and columns
        (block,) = re.findall(r"(?:^|\.)blocks\.(\d+)\.", name)
        tokens = torch.from_numpy(numbers)[None, :, None]
        return holders[Hiera].reroll(tokens, int(block))[0, ..., 0].numpy()
    if MobileVitBlock in holders:  # first tokens of square patches, then all second ones
        numbers = numbers.reshape(tuple(shape))
        side, patches = math.isqrt(len(numbers)), _in_proportion(model, numbers.shape[1])
        return _weave(numbers.reshape(side, side, *patches).transpose(2, 3, 0, 1))
    if NestLevel in holders or (TNT in holders and shape[0] > 1):  # blocks, or pixels of patches
        blocks, inside = (_in_proportion(model, count) for count in shape[-2:])
        return _weave(numbers.reshape(*blocks, *inside))
    return numbers.reshape(_sides(model, shape, len(numbers)))


def _weave(numbers: np.ndarray) -> np.ndarray:
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
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or ())
    return grid if math.prod(grid) == patches and grid else _in_proportion(model, patches)


def _in_proportion(model: nn.Module, count: int) -> tuple[int, int]:
    """Rows and columns of ``count`` tokens in proportion to the image; (1, n) if there are none."""
    _, height, width = input_size(model)
    rows = round(math.sqrt(count * height / width))
    columns = round(rows * width / height)
    return (rows, columns) if rows * columns == count else (1, count)
