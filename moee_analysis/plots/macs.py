"""Where the multiply-accumulates go, layer by layer, next to the dense model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import style


@style.house
def macs(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.macs``: MACs and parameters of every MLP, dense and now.

    Outlines are the dense model, filled bars what is left, pale bars layers that stayed dense,
    hatched parts what goes to tokens that nothing reads; the titles give the totals of the whole
    network.
    """
    layers = table[table["layer"] >= 0]
    total = table[table["component"] == "total"].iloc[0]
    fig, (left, right) = style.figure(max(6.4, 3.4 + 0.34 * len(layers)), 2.7, 1, 2)
    _draw_bars(left, layers, "macs", style.PALETTE[0])
    _draw_unread(left, layers)
    _draw_bars(right, layers, "params", style.PALETTE[2])
    left.set(ylabel="MACs per image (M)", title=_change("MACs", total, "macs"))
    right.set(ylabel="parameters (M)", title=_change("parameters", total, "params"))
    fig.supxlabel("MLP of " + style.LAYER_AXIS)
    return style.caption(fig, caption or _facts(table))


def _draw_bars(ax: Axes, layers: pd.DataFrame, column: str, colour: str) -> None:
    x = layers["layer"].to_numpy()
    kept = np.where(layers["converted"], 1.0, 0.35)
    for place, now, alpha in zip(x, layers[column] / 1e6, kept, strict=True):
        ax.bar(place, now, width=0.72, color=colour, alpha=alpha, lw=0)
    ax.bar(
        x, layers[f"{column}_dense"] / 1e6, width=0.72, facecolor="none", edgecolor=style.GREY, lw=1
    )
    ax.set_xticks(x if len(x) <= 14 else x[::2])
    ax.grid(visible=False, axis="x")


def _draw_unread(ax: Axes, layers: pd.DataFrame) -> None:
    """Hatch what goes to tokens that nothing reads: at the top of a bar, and of its outline."""
    for name, colour, above in (("macs", "white", 3), ("macs_dense", style.GREY, 0.5)):
        unread = layers[name.replace("macs", "macs_unread")] / 1e6
        some = unread > 0
        top = layers[name] / 1e6
        ax.bar(
            layers["layer"][some], unread[some], bottom=(top - unread)[some], width=0.72,
            facecolor="none", edgecolor=colour, hatch="////", lw=0, zorder=above,
        )  # fmt: skip


def _change(name: str, total: pd.Series, column: str) -> str:
    """``MACs: 1.254 → 0.903 G (−28.0 %)``, of the whole network."""
    dense, now = total[f"{column}_dense"], total[column]
    unit, symbol = (1e9, "G") if dense >= 1e9 else (1e6, "M")
    change = f"{100 * (now / dense - 1):+.1f} %".replace("-", "−")
    return f"{name}: {dense / unit:.3f} → {now / unit:.3f} {symbol} ({change})"


def _facts(table: pd.DataFrame) -> str:
    legend = "Outlines: the dense model; pale: layers that stayed dense. "
    if (table["macs_unread_dense"] > 0).any():
        legend += "Hatched: for tokens that nothing reads. "
    return legend + table.attrs.get("caption", "")
