"""What experts look at: the patches they take in pictures, and those that are typical of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style, text

_SIDE = 1.15  # inches of one picture
_LEGEND = 1.5  # inches beside the pictures
_NAMED_PARTS = 22  # as many as fit beside a row; the largest
_AROUND = 1.5  # patches shown on each side of a typical one, which needs some context
_COLUMNS = 6


def _tell_patches(pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray]) -> str:
    """How often neighbouring patches share an expert, beside two patches drawn at random."""
    layers = []
    for layer, choice in sorted(experts.items()):
        taken = np.unique(choice, return_counts=True)[1] / choice.size
        across = (choice[:, :, 1:] == choice[:, :, :-1]).ravel()
        along = (choice[:, 1:] == choice[:, :-1]).ravel()
        shared = pd.Series(np.concatenate([across, along]), dtype=float).mean()
        many = "1 expert takes" if len(taken) == 1 else f"{len(taken)} experts take"
        layers.append(
            f"layer {layer}: {many} the patches, and {text.percent(shared)} of neighbouring "
            f"patches share one (by chance {text.percent(np.square(taken).sum())})"
        )
    words = "; ".join(layers) or "there is no layer of patches to show"
    return f"{text.count(len(pictures), 'picture')}. {text.sentence(words)}"


@drawing.plot(_tell_patches)
def patches(
    pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray], *, names: Sequence[str],
    masks: Sequence[np.ndarray] | None = None, parts: Sequence[str] = (),
    caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw pictures in a row, and below them the expert of every patch, a row per layer.

    ``pictures`` are uint8 (height, width, 3) with a name each, ``experts`` int (pictures, rows,
    columns) by layer, ``masks`` int (height, width) with the names of their values in ``parts``.
    Not as many of each as pictures raises :class:`MoeeError`.
    """
    routed = {f"layer {layer}": experts[layer] for layer in sorted(experts)}
    given = routed | {"names": names, "masks": pictures if masks is None else masks}
    _check_counts(len(pictures), given)
    rows = 1 + len(routed) + (masks is not None)
    size = (_SIDE * len(pictures) + _LEGEND, _SIDE * rows + 0.3)
    widths = [_SIDE] * len(pictures) + [_LEGEND - 0.4]
    fig, grid = style.figure(*size, rows, len(widths), squeeze=False, width_ratios=widths)
    for ax in grid.flat:
        drawing.bare(ax)
    for ax, picture, name in zip(grid[0], pictures, names, strict=False):
        ax.imshow(picture)
        ax.set_title(name, loc="center", size=8)
    for axes, (label, choices) in zip(grid[1:], routed.items(), strict=False):
        colours = style.expert_colours(int(choices.max()) + 1)
        for ax, picture, choice in zip(axes, pictures, choices, strict=False):
            _colour_patches(ax, picture, choice, colours)
        axes[0].set_ylabel(label, size=8)
        used = {str(expert): colours[expert] for expert in np.unique(choices)}
        _name_colours(axes[-1], used, columns=4, title="expert")
    if masks is not None:
        of_parts = _colour_parts(grid[-1], masks)
        grid[-1, 0].set_ylabel("parts", size=8)
        if parts:
            named = {parts[value]: of_parts[value] for value in list(of_parts)[:_NAMED_PARTS]}
            _name_colours(grid[-1, -1], named, columns=2, title="part")
    return style.caption(fig, caption)


def _check_counts(count: int, of_images: Mapping[str, Sequence[object]]) -> None:
    wrong = [f"{len(each)} for {what}" for what, each in of_images.items() if len(each) != count]
    if wrong or not count:
        expected = f"one or more pictures, and as many ({count}) names, masks and routed images"
        found = ", ".join(wrong) or "no picture"
        raise MoeeError(expected, found, "take the same images everywhere")


def _name_colours(ax: Axes, colours: Mapping[str, str], *, columns: int, title: str) -> None:
    legend = ax.legend(
        [Patch(color=colour) for colour in colours.values()], list(colours), title=title,
        title_fontsize=6.5, fontsize=5.5, ncols=columns, loc="upper left", handlelength=0.8,
        handleheight=0.8, columnspacing=0.7, handletextpad=0.3, labelspacing=0.25, borderpad=0,
        alignment="left", bbox_to_anchor=(-0.05, 1.0),
    )  # fmt: skip
    legend.set_in_layout(False)  # a long list may be higher than its row


def _tell_image_layers(pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray]) -> str:
    if not experts:
        return "There is no layer of patches to show."
    met = {n: np.mean([len(np.unique(one)) for one in experts[n]]) for n in sorted(experts)}
    few, many = min(met, key=met.get), max(met, key=met.get)
    each = text.listed(
        f"{text.number(met[layer], 1).removesuffix('.0')} experts in layer {layer}"
        for layer in dict.fromkeys((few, many))
    )
    return f"The patches of one of {len(pictures)} images, on average, meet {each}."


@drawing.plot(_tell_image_layers)
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
        _colour_parts(axes[1:2], [masks[image]])
    size = np.array(pictures[image].shape[:2])
    for ax, layer in zip(axes[-len(experts) :], sorted(experts), strict=False):
        choice, colours = experts[layer][image], style.expert_colours(int(experts[layer].max()) + 1)
        _colour_patches(ax, pictures[image], choice, colours)
        for expert in np.unique(choice):  # its number, on its middle patch
            places = np.argwhere(choice == expert)
            middle = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()]
            y, x = (middle + 0.5) * (size / choice.shape) - 0.5
            drawing.number(ax, x, y, str(expert), size=5.5)
    return style.caption(fig, caption)


def _tell_pieces(pictures: Sequence[np.ndarray], tokens: Mapping[int, np.ndarray]) -> str:
    """How many tokens are left of the patches in the first and the last of the layers."""
    if not tokens:
        return "There is no layer to show."
    left = {n: np.mean([len(np.unique(one)) for one in tokens[n]]) for n in sorted(tokens)}
    each = text.listed(
        f"{text.number(left[layer], 1).removesuffix('.0')} tokens after layer {layer}"
        for layer in dict.fromkeys((min(left), max(left)))
    )
    patches = tokens[min(left)][0].size
    return (
        f"Of the {patches} patches of one of {len(pictures)} images, on average, {each} are left."
    )


@drawing.plot(_tell_pieces)
def pieces(
    pictures: Sequence[np.ndarray], tokens: Mapping[int, np.ndarray], *, names: Sequence[str],
    caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw pictures in a row, and below them, a row per layer, the tokens of their patches.

    ``pictures`` are uint8 (height, width, 3) with a name each, ``tokens`` int (pictures, rows,
    columns) by layer, as ``measure.token_places`` finds them. Patches of one token have one colour,
    the mean of their pixels, and lines where other tokens begin.
    """
    _check_counts(len(pictures), {f"layer {n}": tokens[n] for n in tokens} | {"names": names})
    size = _SIDE * len(pictures) + 0.2, _SIDE * (1 + len(tokens)) + 0.3
    fig, grid = style.figure(*size, 1 + len(tokens), len(pictures), squeeze=False)
    for ax in grid.flat:
        drawing.bare(ax)
    for ax, picture, name in zip(grid[0], pictures, names, strict=True):
        ax.imshow(picture)
        ax.set_title(name, loc="center", size=8)
    for axes, layer in zip(grid[1:], sorted(tokens), strict=True):
        axes[0].set_ylabel(f"layer {layer}", size=8)
        for ax, picture, places in zip(axes, pictures, tokens[layer], strict=True):
            _draw_pieces(ax, picture, places)
    return style.caption(fig, caption)


def _draw_pieces(ax: Axes, picture: np.ndarray, places: np.ndarray) -> None:
    """Mean colours of the tokens ``places`` (rows, columns), and lines between them."""
    height, width = picture.shape[:2]
    rows, columns = places.shape
    of_row, of_column = np.arange(height) * rows // height, np.arange(width) * columns // width
    of_pixel = places[np.ix_(of_row, of_column)]
    pixels = np.maximum(np.bincount(of_pixel.ravel()), 1)
    means = [np.bincount(of_pixel.ravel(), band.ravel()) / pixels for band in picture.T.mT]
    ax.imshow(np.stack(means, axis=-1)[of_pixel] / 255, interpolation="nearest")
    tall, wide = height / rows, width / columns
    below, right = np.argwhere(np.diff(places, axis=0)), np.argwhere(np.diff(places, axis=1))
    lines = [[(x * wide, (y + 1) * tall), ((x + 1) * wide, (y + 1) * tall)] for y, x in below]
    lines += [[((x + 1) * wide, y * tall), ((x + 1) * wide, (y + 1) * tall)] for y, x in right]
    ends = np.reshape(lines, (-1, 2, 2)) - 0.5
    for colour, thick in (("white", 11), (style.INK, 5)):  # one of them is seen on any colour
        ax.add_collection(LineCollection(ends, color=colour, lw=thick / max(places.shape)))


def _tell_top_patches(table: pd.DataFrame, pictures: object = None) -> str:
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


@drawing.plot(_tell_top_patches)
def top_patches(
    table: pd.DataFrame, pictures: Mapping[int, np.ndarray] | Sequence[np.ndarray], *,
    caption: str | None = None,
) -> Figure:  # fmt: skip
    """Draw the patches of a table of ``measure.top_patches``, framed, with what is around them.

    ``pictures`` are uint8 (height, width, 3), by the table's ``image``. Each layer and expert
    takes a row; a table without rows raises :class:`MoeeError`.
    """
    if table.empty:
        found = "an expert that no patch of these images goes to"
        raise MoeeError("typical patches to draw", found, "choose another expert, or more images")
    experts = [rows for _, rows in table.groupby(["layer", "expert"], sort=False)]
    counts = [math.ceil(len(rows) / _COLUMNS) for rows in experts]
    fig, parts = style.stack_parts(1.05 * _COLUMNS, [1.25 * count + 0.3 for count in counts])
    for part, count, rows in zip(parts, counts, experts, strict=True):
        title = "layer {layer}, expert {expert}: {share:.1%} of the patches, in {images} images"
        part.suptitle(title.format_map(rows.iloc[0]), size=8.5, x=0.01, ha="left")
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


def _expert(row: pd.Series) -> str:
    return (
        f"expert {row['expert']:.0f} of layer {row['layer']:.0f} takes "
        f"{text.percent(row['share'])} of the patches, in {row['images']:.0f} images"
    )


def _colour_patches(ax: Axes, picture: np.ndarray, experts: np.ndarray, colours: list[str]) -> None:
    """Lay the colours of patches' experts (rows, columns) over a pale grey picture."""
    height, width = picture.shape[:2]
    ax.imshow(picture.mean(axis=2), cmap="gray", vmin=-255, vmax=255)  # pale
    _colour(ax, experts, colours, alpha=0.68, extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def _colour_parts(axes: Sequence[Axes], masks: Sequence[np.ndarray]) -> dict[int, str]:
    """Draw part masks, one on each of ``axes``; return the colours of parts, largest part first."""
    values, pixels = np.unique(np.concatenate([mask.ravel() for mask in masks]), return_counts=True)
    parts = values[np.argsort(-pixels, kind="stable")]
    colours = dict(zip(parts.tolist(), style.expert_colours(len(parts)), strict=True))
    for ax, mask in zip(axes, masks, strict=False):
        _colour(ax, mask, [colours.get(value, "white") for value in range(values[-1] + 1)])
    return colours


def _colour(ax: Axes, values: np.ndarray, colours: Sequence[str], **options: Any) -> None:
    ends = {"vmin": -0.5, "vmax": len(colours) - 0.5, "interpolation": "nearest"}
    ax.imshow(values, cmap=ListedColormap(colours), **ends, **options)
