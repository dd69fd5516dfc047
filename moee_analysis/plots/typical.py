"""What an expert looks at: its most typical patches, and the experts of one image's patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style

AROUND = 1.5
"""Patches that are shown on each side of a typical one: it needs some context to be recognised."""

_COLUMNS = 6


@style.house
def top_patches(
    table: pd.DataFrame, pictures: Mapping[int, np.ndarray] | Sequence[np.ndarray], *,
    caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw the patches of a table of ``measure.top_patches``, framed, with what is around them.

    Parameters
    ----------
    table
        A row of pictures per layer and expert, so better a few of them.
    pictures
        uint8 (height, width, 3) by the table's ``image``.

    Raises
    ------
    MoeeError
        A table without rows.
    """
    if table.empty:
        raise MoeeError(
            "typical patches to draw", "an expert that no patch of these images goes to",
            "choose another expert, or more images",
        )  # fmt: skip
    groups = list(table.groupby(["layer", "expert"], sort=False))
    rows = [math.ceil(len(part) / _COLUMNS) for _, part in groups]
    fig, parts = style.stacked(1.05 * _COLUMNS, [1.25 * count + 0.3 for count in rows])
    for place, count, ((layer, expert), part) in zip(parts, rows, groups, strict=True):
        first = part.iloc[0]
        place.suptitle(
            f"{style.layer_label(layer)}, expert {expert}: {first['share']:.1%} of the patches, "
            f"in {first['images']} images",
            size=8.5, x=0.01, ha="left",
        )  # fmt: skip
        axes = place.subplots(count, _COLUMNS, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, row in zip(axes, part.itertuples(), strict=False):
            _draw_patch(ax, pictures[row.image], row)
    return drawing.finish(fig, table, caption)


@style.house
def image_layers(
    pictures: Sequence[np.ndarray],
    experts: Mapping[int, np.ndarray],
    *,
    image: int,
    names: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
    caption: str | None = None,
) -> Figure:
    """Draw one picture and, beside it, the expert of each of its patches in every layer.

    Colours are experts and mean nothing across layers.

    Parameters
    ----------
    pictures, experts, names, masks
        As in ``patches``.
    image
        Which of the pictures to draw.
    """
    known = masks is not None
    fig, axes = style.panels(1 + known + len(experts), cols=7, size=(1.3, 1.45))
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(pictures[image])
    axes[0].set_title(names[image], loc="center", size=8)
    if known:
        drawing.part_masks(axes[1:2], [masks[image]])
        axes[1].set_title("its parts", loc="center", size=8)
    for ax, layer in zip(axes[1 + known :], sorted(experts), strict=True):
        colours = drawing.expert_colours(int(experts[layer].max()) + 1)
        _draw_numbered(ax, pictures[image], experts[layer][image], colours)
        ax.set_title(style.layer_label(layer), loc="center", size=8)
    return style.caption(fig, caption)


def _draw_numbered(
    ax: Axes, picture: np.ndarray, experts: np.ndarray, colours: Sequence[str]
) -> None:
    """Colour every patch by its expert, and write each expert's number on its middle patch."""
    drawing.patch_experts(ax, picture, experts, colours)
    size = np.array(picture.shape[:2]) / experts.shape
    for expert in np.unique(experts):
        places = np.argwhere(experts == expert)
        middle = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()]
        y, x = (middle + 0.5) * size - 0.5
        drawing.number(ax, x, y, str(expert), size=5.5)


def _draw_patch(ax: Axes, picture: np.ndarray, row: object) -> None:
    """Draw a patch framed, with :data:`AROUND` of its neighbours on each side."""
    height, width = picture.shape[:2]
    tall, wide = height / row.rows, width / row.columns
    top, left = row.row * tall, row.column * wide
    ax.imshow(picture, interpolation="nearest")
    frame = {"fill": False, "lw": 1.6}
    ax.add_patch(Rectangle((left - 0.5, top - 0.5), wide, tall, ec="white", **frame | {"lw": 3}))
    ax.add_patch(Rectangle((left - 0.5, top - 0.5), wide, tall, ec=style.PALETTE[1], **frame))
    side = (1 + 2 * AROUND) * max(tall, wide)
    x = np.clip(left + wide / 2, min(side, width) / 2, max(width - side / 2, width / 2))
    y = np.clip(top + tall / 2, min(side, height) / 2, max(height - side / 2, height / 2))
    ax.set_xlim(x - side / 2 - 0.5, x + side / 2 - 0.5)
    ax.set_ylim(y + side / 2 - 0.5, y - side / 2 - 0.5)
    ax.set_title(row.class_name, loc="center", size=6.5, pad=2)
