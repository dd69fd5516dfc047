"""How a model comes nearer to its dense model, epoch after epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moee_analysis.plots import style
from moee_analysis.plots.drawing import finish

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.5}


@style.house
def fine_tuning(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw divergence from the dense model (left) and agreement with it (right) over the epochs.

    A ring marks the epoch of the lowest divergence, whose weights are kept; a dotted line is what
    there was before any training.

    Parameters
    ----------
    table
        One row for each epoch, from 0: ``epoch``, ``loss`` (nan before any training), ``kl`` (nats)
        and ``agreement`` (a share) on images held out. With a column ``system`` there is a line for
        each of its values.
    """
    named = table if "system" in table else table.assign(system="on images held out")
    fig, (left, right) = style.figure(6.4, 2.7, 1, 2)
    colours = style.colours(named["system"])
    for system, rows in named.groupby("system", sort=False):
        _draw(left, rows, "kl", label=system, color=colours[system])
        _draw(right, rows.assign(agreement=100 * rows["agreement"]), "agreement",
              label=system, color=colours[system])  # fmt: skip
    if len(colours) == 1:
        trained = named.dropna(subset="loss")
        left.plot(trained["epoch"], trained["loss"], color=style.GREY, label="training loss")
    left.set(ylabel="KL(dense || model) (nats)", title="divergence from the dense model")
    right.set(ylabel="same prediction (% of images)", title="agreement with the dense model")
    left.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("epoch (0: before fine-tuning)")
        ax.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    return finish(fig, table, caption)


def _draw(ax: Axes, rows: pd.DataFrame, value: str, *, label: str, color: str) -> None:
    ax.axhline(rows[value].iloc[0], color=color, lw=0.9, ls=":")
    ax.plot(rows["epoch"], rows[value], color=color, label=label, **_LINE)
    kept = rows.loc[rows["kl"].idxmin()]
    ax.plot(kept["epoch"], kept[value], "o", ms=9, mfc="none", mec=color, mew=1.2)
