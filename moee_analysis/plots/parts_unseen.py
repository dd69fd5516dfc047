"""Which parts of a scene are no longer seen once an expert is knocked out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style

_DOT = {"color": style.INK, "mec": "white"}


@style.house
def parts_unseen(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.parts_unseen``: change in recall, parts by experts removed.

    A row of panels for each layer: the experts, and as many random patches. Parts come most
    frequent first, with the recall of the intact model; a dot marks a change whose interval leaves
    out 0.
    """
    layers, systems = (list(dict.fromkeys(table[column])) for column in ("layer", "system"))
    parts = list(dict.fromkeys(table["part"]))
    experts = table.groupby("layer")["expert"].nunique().max()
    width, height = 2 * (0.5 + 0.115 * experts) + 1.6, 0.65 + 0.135 * len(parts)
    fig, grid = style.figure(
        width, height * len(layers), len(layers), len(systems), squeeze=False, sharey=True
    )
    top = max(float(table["change"].abs().quantile(0.995)), 0.01)
    norm = TwoSlopeNorm(0, vmin=-100 * top, vmax=100 * top)
    recall = table.drop_duplicates("part").set_index("part")["recall_intact"]
    names = [f"{part} ({recall[part]:.0%})" for part in parts]
    for axes, layer in zip(grid, layers, strict=True):
        for ax, system in zip(axes, systems, strict=True):
            cells = table[(table["layer"] == layer) & (table["system"] == system)]
            change = _square(cells, "change", parts)
            image = drawing.heat_map(ax, 100 * change, cmap="RdBu", norm=norm, aspect="auto")
            numbers = drawing.thinned([str(e) for e in range(change.shape[1])], most=14)
            drawing.name_cells(ax, names, numbers)
            clear = (_square(cells, "low", parts) > 0) | (_square(cells, "high", parts) < 0)
            ax.plot(*np.nonzero(clear)[::-1], ls="", marker="o", ms=2.4, mew=0.5, **_DOT)
            ax.set_title(f"{style.layer_label(layer)}, {system}")
    fig.supxlabel("expert removed, or replaced by as many random patches", size=9)
    fig.supylabel("part (recall of the intact model)", size=9)
    drawing.bar_beside(fig, list(grid.flat), image, "change in recall (percentage points)")
    return drawing.finish(fig, table, caption)


def _square(cells: pd.DataFrame, value: str, parts: list[str]) -> np.ndarray:
    """Values (parts, experts)."""
    return cells.pivot(index="part", columns="expert", values=value).loc[parts].to_numpy()
