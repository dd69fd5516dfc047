"""What an expert looks at: its most typical patches, and the experts of one image's patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style, text

_AROUND = 1.5  # patches shown on each side of a typical one, which needs some context
_COLUMNS = 6


@style.house
def top_patches(
    table: pd.DataFrame, pictures: Mapping[int, np.ndarray] | Sequence[np.ndarray], *,
    caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw the patches of a table of ``measure.top_patches``, framed, with what is around them.

    ``pictures`` are uint8 (height, width, 3), by the table's ``image``. Each layer and expert
    takes a row; a table without rows raises :class:`MoeeError`.
    """
    if table.empty:
        raise MoeeError(
            "typical patches to draw", "an expert that no patch of these images goes to",
            "choose another expert, or more images",
        )  # fmt: skip
    experts = [rows for _, rows in table.groupby(["layer", "expert"], sort=False)]
    counts = [math.ceil(len(rows) / _COLUMNS) for rows in experts]
    fig, parts = style.stacked(1.05 * _COLUMNS, [1.25 * count + 0.3 for count in counts])
    for part, count, rows in zip(parts, counts, experts, strict=True):
        first = rows.iloc[0]
        title = f"layer {first['layer']}, expert {first['expert']}: "
        title += f"{first['share']:.1%} of the patches, in {first['images']} images"
        part.suptitle(title, size=8.5, x=0.01, ha="left")
        axes = part.subplots(count, _COLUMNS, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, row in zip(axes, rows.itertuples(), strict=False):
            _draw_patch(ax, pictures[row.image], row)
    return drawing.finish(fig, table, caption)


def _draw_patch(ax: Axes, picture: np.ndarray, row: Any) -> None:
    height, width = picture.shape[:2]
    tall, wide = height / row.rows, width / row.columns
    top, left = row.row * tall, row.column * wide
    ax.imshow(picture, interpolation="nearest")
    for colour, thick in (("white", 3), (style.PALETTE[1], 1.6)):
        frame = Rectangle((left - 0.5, top - 0.5), wide, tall, fill=False, ec=colour, lw=thick)
        ax.add_patch(frame)
    side = (1 + 2 * _AROUND) * max(tall, wide)
    ax.set_xlim(_window(left + wide / 2, side, width))
    ax.set_ylim(_window(top + tall / 2, side, height)[::-1])
    ax.set_title(row.class_name, loc="center", size=6.5, pad=2)


def _window(middle: float, side: float, size: int) -> tuple[float, float]:
    """Ends of a window around ``middle``, within the picture as far as it is large enough."""
    middle = np.clip(middle, min(side, size) / 2, max(size - side / 2, size / 2))
    return middle - side / 2 - 0.5, middle + side / 2 - 0.5


@text.describes(top_patches)
def _describe_top_patches(table: pd.DataFrame, pictures: object = None) -> str:
    experts = table.drop_duplicates(["layer", "expert"])
    if experts.empty:
        return "No patch goes to the experts that were asked for."
    words = _expert(text.largest(experts, "share"))
    if len(experts) > 1:
        words = f"of {len(experts)} experts {words}, {_expert(text.smallest(experts, 'share'))}"
    last = table.groupby(["layer", "expert"], sort=False)["cosine"].min().reset_index()
    alike = text.largest(last, "cosine")
    return text.sentence(words) + (
        f" The patches shown are most alike for expert {alike['expert']:.0f} of layer "
        f"{alike['layer']:.0f}: all have a cosine of {text.number(alike['cosine'])} or more with "
        "its mean input."
    )


def _expert(row: pd.Series) -> str:
    return (
        f"expert {row['expert']:.0f} of layer {row['layer']:.0f} takes "
        f"{text.percent(row['share'])} of the patches, in {row['images']:.0f} images"
    )


@style.house
def image_layers(
    pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray], *, image: int,
    names: Sequence[str], masks: Sequence[np.ndarray] | None = None, caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw the picture number ``image`` and, beside it, the experts of its patches in every layer.

    Colours mean nothing across layers. The other arguments are those of :func:`patches`.
    """
    titles = [names[image], *(["its parts"] if masks is not None else [])]
    titles += [f"layer {layer}" for layer in sorted(experts)]
    fig, axes = style.panels(len(titles), cols=7, size=(1.3, 1.45))
    for ax, title in zip(axes, titles, strict=True):
        ax.set_axis_off()
        ax.set_title(title, loc="center", size=8)
    axes[0].imshow(pictures[image])
    if masks is not None:
        drawing.colour_parts(axes[1:2], [masks[image]])
    for ax, layer in zip(axes[-len(experts) :], sorted(experts), strict=False):
        colours = style.expert_colours(int(experts[layer].max()) + 1)
        _draw_numbered(ax, pictures[image], experts[layer][image], colours)
    return style.caption(fig, caption)


def _draw_numbered(ax: Axes, picture: np.ndarray, experts: np.ndarray, colours: list[str]) -> None:
    """Colour every patch by its expert, and write each expert's number on its middle patch."""
    drawing.colour_patches(ax, picture, experts, colours)
    size = np.array(picture.shape[:2]) / experts.shape
    for expert in np.unique(experts):
        places = np.argwhere(experts == expert)
        middle = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()]
        y, x = (middle + 0.5) * size - 0.5
        drawing.number(ax, x, y, str(expert), size=5.5)


@text.describes(image_layers)
def _describe_image_layers(
    pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray]
) -> str:
    if not experts:
        return "There is no layer of patches to show."
    met = {
        layer: np.mean([len(np.unique(one)) for one in experts[layer]]) for layer in sorted(experts)
    }
    few, many = min(met, key=met.get), max(met, key=met.get)
    each = text.listed(
        f"{text.number(met[layer], 1).removesuffix('.0')} experts in layer {layer}"
        for layer in dict.fromkeys((few, many))
    )
    return f"The patches of one of {len(pictures)} images, on average, meet {each}."
