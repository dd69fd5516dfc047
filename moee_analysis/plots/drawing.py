"""What figures are drawn with: heat maps, curves, rows of dots, legends, sheets; their words."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from moee_analysis.errors import MoeeError
from moee_analysis.plots import style, text

WIDTH = 9.6  # inches that figures may take side by side on a sheet
_GAP = 0.12  # inches between them

Look = dict[str, Any]
Plot = TypeVar("Plot", bound=Callable[..., Figure])

_WORDS: dict[Callable[..., object], Callable[..., str]] = {}


def plot(
    words: Callable[..., str], beginning: str = "", *, by: str = "system"
) -> Callable[[Plot], Plot]:
    """Give a plot the look of the house, and ``words`` that say what it shows of the same table.

    With a ``beginning`` they go on from there, of the rows of each value of ``by``.
    """

    def note(function: Plot) -> Plot:
        drawn = style.house(function)
        _WORDS[drawn] = words
        if beginning:
            _WORDS[drawn] = lambda table: f"{beginning}: {text.of_each(table, words, by)}."
        return drawn

    return note


def describe(plot: Callable[..., object], *given: Any) -> str:
    """Say in a sentence or two what ``plot`` shows; without words it raises ``MoeeError``."""
    if plot not in _WORDS:
        found = f"none for '{getattr(plot, '__name__', plot)}'"
        hint = "decorate it with @drawing.plot(words), or give the figure's finding as text"
        raise MoeeError("a function that describes the plot", found, hint)
    return _WORDS[plot](*given)


def by_layer(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of every system and layer, by the title of their panel; a single system is not named."""
    several = table["system"].nunique() > 1
    groups = table.groupby(["system", "layer"], sort=False)
    return {f"{name}\nlayer {n}" if several else f"layer {n}": rows for (name, n), rows in groups}


def in_percent(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """``table`` with the shares in those of ``columns`` that it has in %."""
    return table.assign(**{name: 100 * table[name] for name in table.columns.intersection(columns)})


def square(table: pd.DataFrame, value: str, name: str) -> pd.DataFrame:
    """Values of a table of pairs by its ``order_a``, under names from ``<name>_a``."""
    names = table.drop_duplicates("order_a").set_index("order_a")[f"{name}_a"]
    matrix = table.pivot(index="order_a", columns="order_b", values=value)
    return matrix.rename(index=names, columns=names)


def heat_map(
    ax: Axes, values: pd.DataFrame, *, most: int = 11, size: float = 6.5, **options: Any
) -> QuadMesh:
    """Draw numbers as colours, with at most so many names; ``options`` go to ``sns.heatmap``."""
    rows, columns = (math.ceil(count / most) for count in values.shape)
    names = {"yticklabels": rows, "xticklabels": columns, "cbar": False}
    if "norm" in options:
        names |= {"vmin": 0, "vmax": 1}  # not used, but seaborn would look for them among NaN
    ax.grid(visible=False)
    ax.tick_params(length=0, labelsize=size)
    ax.figure.set_visible(False)  # seaborn would draw the whole figure for each of its heat maps
    sns.heatmap(values, ax=ax, **names | options)
    ax.figure.set_visible(True)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="y", rotation=0)
    upright = all(len(label.get_text()) <= 2 for label in ax.get_xticklabels())
    ax.tick_params(axis="x", rotation=0 if upright else 90)
    return ax.collections[0]


def heat_maps(
    maps: dict[str, pd.DataFrame], bar: str, *, cols: int, panel: tuple[float, float], **look: Any
) -> tuple[Figure, list[Axes]]:
    """A ``panel`` of so many inches for each map, under its title; ``bar`` names their colours."""
    fig, axes = style.panels(len(maps), cols=cols, size=panel)
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        mesh = heat_map(ax, values, **look)
        ax.set_title(title)
    bar_beside(fig, axes, mesh, bar)
    return fig, axes


def bar_beside(fig: Figure, axes: Sequence[Axes], mesh: QuadMesh, label: str) -> None:
    """Draw one colour bar for all of ``axes``."""
    bar = fig.colorbar(mesh, ax=axes, shrink=0.7, aspect=25, pad=0.02)
    bar.set_label(label, size=8)
    bar.outline.set_visible(False)


def part_groups(groups: pd.Series | pd.Index, *lines: Callable[..., object], **look: Any) -> None:
    """Draw ``lines``, such as ``ax.axhline``, where one of the ``groups`` of rows ends."""
    ends = groups.to_numpy()[1:] != groups.to_numpy()[:-1]
    for place in np.flatnonzero(ends) + 1:
        for line in lines:
            line(place, **look)


def curves(
    ax: Axes, table: pd.DataFrame, value: str, *, x: str = "layer", by: str = "system",
    looks: dict[str, Look] | None = None, band: bool = False, chance: dict[str, str] | None = None,
    dashes: Sequence[str] = ("--", ":"),
) -> None:  # fmt: skip
    """Draw ``value`` over ``x``, a line with marks for each name in ``by``.

    ``band`` adds its interval, ``low`` to ``high``; ``chance`` names columns that get ``dashes``.
    """
    if table.empty:
        return
    looks = pd.DataFrame(looks or style.looks(table[by])).T
    colours, markers = looks["color"].to_dict(), looks["marker"].to_dict()
    common = {"x": x, "hue": by, "palette": colours, "estimator": None, "ax": ax}
    sns.lineplot(table, y=value, style=by, markers=markers, dashes=False, **common)
    for (column, name), dash in zip((chance or {}).items(), dashes, strict=False):
        sns.lineplot(table, y=column, legend=False, ls=dash, lw=1, **common)
        ax.plot([], label=name, color=style.GREY, ls=dash, lw=1)
    for name, rows in table.sort_values(x).groupby(by) if band else ():
        ax.fill_between(rows[x], rows["low"], rows["high"], color=colours[name], alpha=0.18, lw=0)
    ax.get_legend().remove()
    ax.set(xlabel="", ylabel="")


def dots(
    ax: Axes, table: pd.DataFrame, columns: Sequence[str], names: Sequence[str], *,
    colours: Sequence[str], faces: Sequence[str] | None = None,
    markers: Sequence[str] | str = "o", **label: Any,
) -> None:  # fmt: skip
    """A row for each of ``table``: value, low and high end of its interval are ``columns``."""
    row_axis(ax, names, **label)
    value, low, high = (table[name].to_numpy(float) for name in columns)
    places, markers = np.arange(len(table)), np.broadcast_to(markers, len(table))
    colours, faces = np.array(colours), np.array(colours if faces is None else faces)
    ax.hlines(places, low, high, color=colours, **style.INTERVAL)
    for marker in dict.fromkeys(markers):
        own = markers == marker
        look = {"facecolor": faces[own], "edgecolor": colours[own], "marker": marker}
        ax.scatter(value[own], places[own], s=26, linewidth=1.2, zorder=4, **look)


def beside(
    ax: Axes, table: pd.DataFrame, columns: Sequence[str], *, by: str, looks: dict[str, Look],
    apart: float, **line: Any,
) -> None:  # fmt: skip
    """Values with intervals over an x, names in ``by`` set ``apart`` from the first to the last.

    ``columns`` are x, value, low and high end.
    """
    places = np.linspace(-apart / 2, apart / 2, len(looks)) if len(looks) > 1 else [0]
    for place, (name, look) in zip(places, looks.items(), strict=True):
        rows = table[table[by] == name].sort_values(columns[0])
        x, value, *ends = (rows[column] for column in columns)
        ax.vlines(x + place, *ends, color=look["color"], **style.INTERVAL)
        ax.plot(x + place, value, label=name, **{"zorder": 3} | look | line)


def row_axis(ax: Axes, names: Sequence[str], **look: Any) -> None:
    """Name the rows from above, without ticks and lines between them."""
    ax.set_yticks(range(len(names)), names, **look)
    ax.set(ylim=(len(names) - 0.5, -0.5), ylabel="")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def whole_ticks(ax: Axes) -> None:
    """Put ticks at whole numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain_log(axis: Axis, *, subs: tuple[float, ...] = (1,)) -> None:
    """Write the ticks of a logarithmic axis as plain numbers, at ``subs`` times powers of 10."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def finish(
    fig: Figure, table: pd.DataFrame, caption: str | None, *sources: Axes | dict[str, Look],
    layers: Sequence[Axes] = (), x: str = "", y: str = "", columns: int = 4,
    loc: str = "outside upper left",
) -> Figure:  # fmt: skip
    """Write what all panels share: labels, one legend, and ``caption``, else the table's own.

    The legend is of what has a label in the ``sources`` that are axes, and of looks by name. Axes
    of ``layers`` get ticks at whole layers only.
    """
    for ax in layers:
        whole_ticks(ax)
        ax.set_xlabel("")
    if x or len(layers):
        fig.supxlabel(x or style.LAYER_AXIS)
    if y:
        fig.supylabel(y)
    marks: dict[str, Artist] = {}
    for source in sources:
        if isinstance(source, dict):
            marks |= {name: Line2D([], [], **look) for name, look in source.items()}
        else:
            handles, names = source.get_legend_handles_labels()
            marks |= dict(zip(names, handles, strict=True))
    if marks:
        columns = min(columns, len(marks))
        fig.legend(list(marks.values()), list(marks), loc=loc, ncols=columns, borderpad=0)
    return style.caption(fig, caption or table.attrs.get("caption"))


def bare(ax: Axes) -> None:
    """No ticks, grid or frame; the label of the axis stays."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])


def number(ax: Axes, x: float, y: float, text: str, *, size: float = 7) -> None:
    """Write ``text`` at a place of a picture, readable on every colour."""
    halo = [withStroke(linewidth=2, foreground="white")]
    written = ax.text(x, y, text, size=size, ha="center", va="center", path_effects=halo)
    written.set_in_layout(False)  # it is inside: the layout is quicker without it


def sheet(figures: Sequence[Figure], *, caption: str | None = None) -> Figure:
    """Put finished figures on one, as pictures, side by side; none raises :class:`MoeeError`."""
    if not figures:
        raise MoeeError("figures for a sheet", "none", "pass at least one")
    dpi, pictures = style.HOUSE["figure.dpi"], []
    for each in figures:
        buffer = io.BytesIO()
        each.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
        pictures.append(Image.open(buffer).convert("RGB"))
    width, height = np.max([each.size for each in pictures], axis=0) + _GAP * dpi
    lines = math.ceil(len(pictures) / max(1, int(WIDTH * dpi // width)))
    columns = math.ceil(len(pictures) / lines)  # lines of equal length, as far as they can be
    size = (width / dpi, height / dpi)
    fig, axes = style.panels(len(pictures), cols=columns, size=size)
    fig.get_layout_engine().set(w_pad=0, h_pad=0, wspace=0, hspace=0)
    for ax, picture in zip(axes, pictures, strict=True):
        ax.set_axis_off()
        ax.imshow(picture, interpolation="nearest", aspect="auto")
        ax.set(xlim=(0, width), ylim=(height, 0))
    return style.caption(fig, caption)
