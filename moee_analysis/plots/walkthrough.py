"""The paper's Figure 1 step by step: tokens in clusters, and experts on the patches of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moee_analysis.errors import MoeeError
from moee_analysis.plots import drawing, style

_SIDE = 1.15  # inches of one picture
_LEGEND = 1.5  # inches beside the pictures
_NAMED_PARTS = 22  # as many as fit beside a row; the largest


@style.house
def embedding(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw tokens as points, coloured and numbered by cluster; noise is light grey.

    ``table`` has the columns ``layer``, ``x``, ``y`` and ``cluster`` (-1: in no cluster), a row
    per token.
    """
    groups = list(table.groupby("layer"))
    fig, axes = style.panels(len(groups), cols=3, size=(2.6, 2.6))
    for ax, (layer, tokens) in zip(axes, groups, strict=True):
        _draw_tokens(ax, tokens)
        clusters = tokens.loc[tokens["cluster"] >= 0, "cluster"].nunique()
        noise = (tokens["cluster"] < 0).mean()
        ax.set_title(f"{style.layer_label(layer)}: {clusters} clusters, {noise:.0%} noise")
    return drawing.finish(fig, table, caption)


@style.house
def surrogate(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.surrogate``: clusters found, and clusters invented, per layer."""
    fig, axes = style.figure(6.4, 2.5, 1, 2)
    found = {"clusters": ("clusters found", axes[0]), "noise_share": ("share of noise", axes[1])}
    for value, (label, ax) in found.items():
        wide = table.pivot(index="layer", columns="data", values=value)
        places = np.arange(len(wide))
        for shift, data, colour in ((-0.2, "activations", 0), (0.2, "surrogate", 1)):
            ax.bar(places + shift, wide[data], 0.38, color=style.PALETTE[colour], label=data)
        ax.set_xticks(places, [str(layer) for layer in wide.index])
        ax.set(ylabel=label)
    fig.supxlabel(style.LAYER_AXIS, size=9)
    drawing.legend_above(fig, axes[0])
    return drawing.finish(fig, table, caption)


@style.house
def patches(
    pictures: Sequence[np.ndarray],
    experts: Mapping[int, np.ndarray],
    *,
    names: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
    parts: Sequence[str] = (),
    caption: str | None = None,
) -> Figure:
    """Draw pictures in a row, and below them the expert of every patch, a row per layer.

    Parameters
    ----------
    pictures
        uint8 (height, width, 3) each.
    experts
        Expert of each patch by layer, int (pictures, rows, columns).
    names
        A title for each picture.
    masks, parts
        Part mask of each picture, int (height, width), drawn last; and the names of its values.

    Raises
    ------
    MoeeError
        Not as many names, masks or routed images as pictures.
    """
    _check_counts(len(pictures), names, experts, masks)
    layers = sorted(experts)
    rows = 1 + len(layers) + (masks is not None)
    fig, grid = style.figure(
        _SIDE * len(pictures) + _LEGEND, _SIDE * rows + 0.3, rows, len(pictures) + 1,
        squeeze=False, width_ratios=[_SIDE] * len(pictures) + [_LEGEND - 0.4],
    )  # fmt: skip
    for ax in grid.flat:
        _bare(ax)
    for ax, picture, name in zip(grid[0], pictures, names, strict=False):
        ax.imshow(picture)
        ax.set_title(name, loc="center", size=8)
    for axes, layer in zip(grid[1:], layers, strict=False):
        _draw_experts(axes, pictures, experts[layer], layer)
    if masks is not None:
        _draw_masks(grid[-1], masks, parts)
    return style.caption(fig, caption)


def _draw_tokens(ax: Axes, tokens: pd.DataFrame) -> None:
    _bare(ax)
    noise, rest = tokens[tokens["cluster"] < 0], tokens[tokens["cluster"] >= 0]
    size = float(np.clip(6000 / len(tokens), 0.6, 8))
    ax.scatter(noise["x"], noise["y"], s=size, color=drawing.NOISE, lw=0, rasterized=True)
    colours = drawing.expert_colours(int(rest["cluster"].max()) + 1 if len(rest) else 0)
    for cluster, part in rest.groupby("cluster"):
        ax.scatter(part["x"], part["y"], s=size, color=colours[cluster], lw=0, rasterized=True)
    for cluster, part in rest.groupby("cluster"):
        drawing.number(ax, part["x"].median(), part["y"].median(), str(cluster))


def _draw_experts(
    axes: np.ndarray, pictures: Sequence[np.ndarray], experts: np.ndarray, layer: int
) -> None:
    """Lay the colours of the experts over the grey pictures; name the experts in the last place."""
    colours = drawing.expert_colours(int(experts.max()) + 1)
    for ax, picture, choice in zip(axes, pictures, experts, strict=False):
        drawing.patch_experts(ax, picture, choice, colours)
    axes[0].set_ylabel(style.layer_label(layer), size=8)
    used = np.unique(experts)
    _name_colours(axes[-1], [(str(e), colours[e]) for e in used], columns=4, title="expert")


def _draw_masks(axes: np.ndarray, masks: Sequence[np.ndarray], parts: Sequence[str]) -> None:
    colours = drawing.part_masks(axes, masks)
    axes[0].set_ylabel("parts", size=8)
    if parts:
        named = [(parts[value], colour) for value, colour in colours.items()]
        _name_colours(axes[-1], named[:_NAMED_PARTS], columns=2, title="part")


def _name_colours(ax: Axes, entries: list[tuple[str, str]], *, columns: int, title: str) -> None:
    legend = ax.legend(
        [Patch(color=colour) for _, colour in entries], [name for name, _ in entries], title=title,
        title_fontsize=6.5, fontsize=5.5, ncols=columns, loc="upper left", handlelength=0.8,
        handleheight=0.8, columnspacing=0.7, handletextpad=0.3, labelspacing=0.25, borderpad=0,
        alignment="left", bbox_to_anchor=(-0.05, 1.0),
    )  # fmt: skip
    legend.set_in_layout(False)  # a long list may be higher than its row


def _bare(ax: Axes) -> None:
    """No ticks, grid or frame; the label of the axis stays."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])


def _check_counts(
    count: int,
    names: Sequence[str],
    experts: Mapping[int, np.ndarray],
    masks: Sequence[np.ndarray] | None,
) -> None:
    found = {"names": len(names)} | {style.layer_label(n): len(e) for n, e in experts.items()}
    found |= {} if masks is None else {"masks": len(masks)}
    wrong = [f"{size} for {what}" for what, size in found.items() if size != count]
    if wrong or not count:
        raise MoeeError(
            f"one or more pictures, and as many ({count}) names, masks and routed images",
            ", ".join(wrong) or "no picture",
            "take the same images everywhere",
        )
