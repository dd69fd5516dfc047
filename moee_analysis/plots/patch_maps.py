"""The paper's Figure 1 step by step: tokens in clusters, and experts on the patches of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style, text

_SIDE = 1.15  # inches of one picture
_LEGEND = 1.5  # inches beside the pictures
_NAMED_PARTS = 22  # as many as fit beside a row; the largest


@style.house
def embedding(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.embedding``: tokens by cluster, noise (-1) grey, by layer."""
    layers = table.groupby("layer")
    fig, axes = style.panels(len(layers), cols=3, size=(2.6, 2.6))
    for ax, (layer, tokens) in zip(axes, layers, strict=True):
        _draw_tokens(ax, tokens.sort_values("cluster", kind="stable"))
        clusters = tokens["cluster"][tokens["cluster"] >= 0].nunique()
        noise = (tokens["cluster"] < 0).mean()
        ax.set_title(f"layer {layer}: {clusters} clusters, {noise:.0%} noise")
    return drawing.finish(fig, table, caption)


def _draw_tokens(ax: Axes, tokens: pd.DataFrame) -> None:
    colours = dict(enumerate(style.expert_colours(tokens["cluster"].max() + 1))) | {-1: style.PALE}
    look = {"hue": "cluster", "palette": colours, "s": float(np.clip(6000 / len(tokens), 0.6, 8))}
    sns.scatterplot(tokens, x="x", y="y", lw=0, rasterized=True, legend=False, ax=ax, **look)
    for cluster, places in tokens[tokens["cluster"] >= 0].groupby("cluster")[["x", "y"]]:
        drawing.number(ax, *places.median(), str(cluster))
    ax.set(xlabel="", ylabel="")
    drawing.bare(ax)


@text.describes(embedding)
def _describe_embedding(table: pd.DataFrame) -> str:
    words = []
    for layer, tokens in table.groupby("layer"):
        clusters = tokens.loc[tokens["cluster"] >= 0, "cluster"].nunique()
        noise = text.percent((tokens["cluster"] < 0).mean())
        words.append(f"{_many(clusters, 'cluster')} in layer {layer} ({noise} in none)")
    return f"The tokens fall into {text.listed(words)}." if words else "No layer is shown."


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@style.house
def surrogate(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.surrogate``: clusters found, and clusters invented, per layer."""
    fig, axes = style.figure(6.4, 2.5, 1, 2)
    labels = {"clusters": "clusters found", "noise_share": "share of noise"}
    look = {"x": "layer", "hue": "data", "palette": style.colours(table["data"]), "errorbar": None}
    for ax, (value, label) in zip(axes, labels.items(), strict=True):
        sns.barplot(table, y=value, saturation=1, ax=ax, **look)
        ax.get_legend().remove()
        ax.set(xlabel="", ylabel=label)
    fig.supxlabel(style.LAYER_AXIS)
    drawing.legend(fig, axes[0])
    return drawing.finish(fig, table, caption)


@text.describes(surrogate)
def _describe_surrogate(table: pd.DataFrame) -> str:
    words = []
    for layer, rows in table.groupby("layer"):
        real, invented = (rows.set_index("data").loc[name] for name in ("activations", "surrogate"))
        words.append(
            f"layer {layer}: {real['clusters']:.0f} clusters and "
            f"{text.percent(real['noise_share'])} noise in the activations, "
            f"{invented['clusters']:.0f} and {text.percent(invented['noise_share'])} in a "
            "surrogate that has no clusters by construction"
        )
    return text.sentence("; ".join(words) or "no layer is shown")


@style.house
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
    _check_counts(len(pictures), {"names": names, "masks": masks} | routed)
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
            drawing.colour_patches(ax, picture, choice, colours)
        axes[0].set_ylabel(label, size=8)
        used = {str(expert): colours[expert] for expert in np.unique(choices)}
        _name_colours(axes[-1], used, columns=4, title="expert")
    if masks is not None:
        _draw_masks(grid[-1], masks, parts)
    return style.caption(fig, caption)


def _check_counts(count: int, of_images: Mapping[str, Sequence[object] | None]) -> None:
    sizes = {what: len(given) for what, given in of_images.items() if given is not None}
    wrong = [f"{size} for {what}" for what, size in sizes.items() if size != count]
    if wrong or not count:
        raise MoeeError(
            f"one or more pictures, and as many ({count}) names, masks and routed images",
            ", ".join(wrong) or "no picture",
            "take the same images everywhere",
        )


def _draw_masks(axes: np.ndarray, masks: Sequence[np.ndarray], parts: Sequence[str]) -> None:
    colours = drawing.colour_parts(axes, masks)
    axes[0].set_ylabel("parts", size=8)
    if parts:
        largest = {parts[value]: colour for value, colour in list(colours.items())[:_NAMED_PARTS]}
        _name_colours(axes[-1], largest, columns=2, title="part")


def _name_colours(ax: Axes, colours: Mapping[str, str], *, columns: int, title: str) -> None:
    legend = ax.legend(
        [Patch(color=colour) for colour in colours.values()], list(colours), title=title,
        title_fontsize=6.5, fontsize=5.5, ncols=columns, loc="upper left", handlelength=0.8,
        handleheight=0.8, columnspacing=0.7, handletextpad=0.3, labelspacing=0.25, borderpad=0,
        alignment="left", bbox_to_anchor=(-0.05, 1.0),
    )  # fmt: skip
    legend.set_in_layout(False)  # a long list may be higher than its row


@text.describes(patches)
def _describe_patches(pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray]) -> str:
    layers = [f"layer {layer}: {_regions(experts[layer])}" for layer in sorted(experts)]
    words = "; ".join(layers) or "there is no layer of patches to show"
    return f"{_many(len(pictures), 'picture')}. {text.sentence(words)}"


def _regions(choice: np.ndarray) -> str:
    """How often neighbouring patches share an expert, beside two patches drawn at random."""
    taken = np.unique(choice, return_counts=True)[1] / choice.size
    across = (choice[:, :, 1:] == choice[:, :, :-1]).ravel()
    along = (choice[:, 1:] == choice[:, :-1]).ravel()
    shared = pd.Series(np.concatenate([across, along]), dtype=float).mean()
    many = "1 expert takes" if len(taken) == 1 else f"{len(taken)} experts take"
    return (
        f"{many} the patches, and {text.percent(shared)} of neighbouring patches share one "
        f"(by chance {text.percent(np.square(taken).sum())})"
    )
