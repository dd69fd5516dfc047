"""Accuracy of several systems, with intervals, next to the dense model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import style


@style.house
def accuracy(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.accuracy``: one line for each system, in the table's order.

    Left: top-1 with its 95 % interval, the grey line is the reference. Right, if the table
    compares with a reference: retention with its interval, and agreement as a hollow dot.
    """
    compared = bool(table["retention"].notna().any())
    height = 1.15 + 0.32 * len(table)
    fig, axes = style.figure(
        7.6 if compared else 4.6, height, 1, 1 + compared, sharey=True, squeeze=False
    )
    _draw_top1(axes[0, 0], table)
    if compared:
        _draw_retention(axes[0, 1], table)
    return style.caption(fig, caption or _facts(table, compared=compared))


def _draw_top1(ax: Axes, table: pd.DataFrame) -> None:
    rows = np.arange(len(table))
    _draw_intervals(ax, table, ("top1", "low", "high"))
    if table["reference_top1"].notna().any():
        ax.axvline(100 * table["reference_top1"].max(), color=style.GREY, lw=1, zorder=0)
    ax.set(xlabel="top-1 accuracy (%)", yticks=rows, yticklabels=table["system"])
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _draw_retention(ax: Axes, table: pd.DataFrame) -> None:
    rows = np.arange(len(table))
    ax.axvline(100, color=style.GREY, lw=1, zorder=0)
    _draw_intervals(ax, table, ("retention", "retention_low", "retention_high"), "retention")
    ax.scatter(
        100 * table["agreement"], rows, s=34, facecolor="white", edgecolor=_colours(table),
        linewidth=1.3, zorder=2, label="agreement",
    )  # fmt: skip
    ax.set(xlabel="compared with the reference (%)")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    _neutral_legend(ax)


def _draw_intervals(
    ax: Axes, table: pd.DataFrame, columns: tuple[str, str, str], label: str = ""
) -> None:
    value, low, high = (100 * table[name].to_numpy(float) for name in columns)
    rows = np.arange(len(table))
    ax.hlines(rows, low, high, color=_colours(table), lw=2.4, alpha=0.55, zorder=3)
    ax.scatter(value, rows, s=34, color=_colours(table), zorder=4, label=label)


def _neutral_legend(ax: Axes) -> None:
    legend = ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handletextpad=0.1)
    for handle, face in zip(legend.legend_handles, (style.INK, "white"), strict=True):
        handle.set(facecolor=face, edgecolor=style.INK)


def _colours(table: pd.DataFrame) -> list[str]:
    colours = style.colours(table["system"])
    return [colours[name] for name in table["system"]]


def _facts(table: pd.DataFrame, *, compared: bool) -> str:
    facts = f"{table['n_images'].max()} images; bars are 95 % intervals of the image bootstrap"
    if not compared:
        return facts + "."
    return (
        facts + "; retention is top-1 / the reference's top-1 (grey line), agreement the share of "
        "images with the reference's prediction."
    )
