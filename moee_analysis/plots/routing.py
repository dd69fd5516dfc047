"""How evenly the experts are used, and what a router costs beside the best one possible."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_METRICS = {
    "gini": ("Gini coefficient", "Gini coefficient", "0 is even"),
    "entropy": ("normalised entropy H / ln E", "Normalised entropy", "1 is even"),
    "max_over_mean": ("largest / mean share", "Largest over mean share", "1 is even"),
    "cv2": ("CV² of the shares", "Squared coefficient of variation", "0 is even"),
    "dead": ("experts never used", "Experts never used", ""),
}
_SHARE = "% of the output's\nvariance"


def _describe_routing(rows: pd.DataFrame) -> str:
    first = rows[rows["rank"] == 0]
    return text.course(first.assign(times=first["share"] * first["n_experts"]), "times")


@drawing.plot(
    _describe_routing, "The most used expert of a layer takes so many times an even share"
)
def routing(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.routing``: shares of the experts by use, a panel per layer.

    Steps of E experts have width 1 / E and height E times the share: every area is 1.
    """
    layers, colours = sorted(table["layer"].unique()), style.colours(table["system"])
    opacity = 0.12 if len(colours) == 1 else 0.0  # overlapping areas would only mix
    fig, axes = style.panels(len(layers), size=(2.0, 1.7), sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        ax.axhline(1, **style.REFERENCE)
        for system, rows in table[table["layer"] == layer].groupby("system", sort=False):
            shares = rows.sort_values("rank")["share"].to_numpy()
            steps = (len(shares) * shares, np.linspace(0, 1, len(shares) + 1))
            ax.stairs(*steps, color=colours[system], lw=1.5, label=system, zorder=3)
            ax.stairs(*steps, color=colours[system], fill=True, alpha=opacity, zorder=2)
        ax.set(title=f"layer {layer}", xlim=(0, 1))
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axes[0].set_ylim(bottom=0)
    labels = {"x": "experts, most used first (rank / E)", "y": "share × E (1 is even)"}
    return _finish(fig, axes[0], table, caption, **labels)


def _finish(
    fig: Figure, ax: Axes, table: pd.DataFrame, caption: str | None, bands: str = "", **shared: Any
) -> Figure:
    systems = table.groupby("system", sort=False)
    counts = [
        f"{name}: {text.span(rows['n_experts'], str)} experts, k = {text.span(rows['k'], str)}"
        for name, rows in systems
    ]
    facts = f"{table['n_images'].max()} images{bands}. {'; '.join(counts)}."
    named = [ax] if len(systems) > 1 else []  # the caption names a single one
    return drawing.finish(fig, table, caption or facts, *named, **shared)


def _describe_balance(table: pd.DataFrame) -> str:
    known = [name for name in _METRICS if name in set(table["metric"])]
    metric = (known or table["metric"].tolist())[0]
    _, name, even = _METRICS.get(metric, (metric, metric, ""))
    rows = table[table["metric"] == metric]
    words = text.of_each(rows, lambda rows: text.course(rows, "value"))
    return f"{name}{f' ({even})' if even else ''} over the layers: {words}."


@drawing.plot(_describe_balance)
def balance(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.balance``: a panel per metric, lines with 95 % intervals."""
    metrics, looks = table["metric"].unique(), style.looks(table["system"])
    band = bool(table["low"].notna().any())
    fig, axes = style.panels(len(metrics), cols=3, size=(2.6, 2.0), sharex=True)
    for ax, metric in zip(axes, metrics, strict=True):
        drawing.curves(ax, table[table["metric"] == metric], "value", looks=looks, band=band)
        title, _, even = _METRICS.get(metric, (metric, metric, ""))
        ax.set_title(f"{title}\n({even})" if even else title)
        low, high = ax.get_ylim()  # every metric from its own zero or one
        if metric == "entropy":
            ax.set_ylim(low, 1 + 0.03 * (1 - low))
        else:
            ax.set_ylim(0, max(1.0, high) if metric in ("dead", "max_over_mean") else high)
        ax.yaxis.get_major_locator().set_params(integer=metric == "dead")  # whole experts
    bands = "; bands are basic 95 % intervals of the image bootstrap" if band else ""
    return _finish(fig, axes[0], table, caption, bands, layers=axes)


def _describe_router_regret(rows: pd.DataFrame) -> str:
    return (
        f"{text.span(rows['error'], text.percent)} (regret "
        f"{text.span(rows['regret'], text.percent)}, best expert for "
        f"{text.span(rows['best'], text.percent)} of the tokens)"
    )


@drawing.plot(
    _describe_router_regret,
    "Squared error of the output over its variance, by router, over the layers",
    by="router",
)
def router_regret(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.router_regret``: a line for every router over the layers."""
    fig, (left, right) = style.figure(7.2, 2.7, 1, 2)
    drawing.curves(left, drawing.in_percent(table, "error"), "error", by="router")
    left.set(yscale="log", title="squared error of the output", ylabel=_SHARE)
    drawing.plain_log(left.yaxis, subs=(1, 3))
    draw_regret(right, table)
    right.set(title="regret: error beyond the best expert's", ylabel="")
    return drawing.finish(fig, table, caption, left, layers=(left, right), columns=5)


def draw_regret(ax: Axes, table: pd.DataFrame) -> None:
    """Draw the regret of every router that has any; the best one possible has none."""
    some = table.groupby("router")["regret"].transform("max") > 0
    regret, looks = drawing.in_percent(table[some], "regret"), style.looks(table["router"])
    drawing.curves(ax, regret, "regret", by="router", looks=looks)
    ax.set(yscale="log", title="regret of the routers", xlabel="layer", ylabel=_SHARE)
    drawing.plain_log(ax.yaxis, subs=(1, 3))
    drawing.whole_ticks(ax)
