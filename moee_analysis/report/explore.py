"""One call that is a panel of widgets in JupyterLab, and a grid of figures where nobody clicks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moee_analysis.errors import MoeeError
from moee_analysis.plots.sheet import sheet
from moee_analysis.utils.progress import is_headless, is_in_notebook

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from ipywidgets import Widget
    from matplotlib.figure import Figure

    Plot = Callable[..., Figure]

FIGURES = 6
"""Figures of a static grid, at most."""


@dataclass(frozen=True)
class DependsOn:
    """Values of a choice that depend on another one, such as the experts of a layer.

    ``values`` are by the value of the choice called ``other``, which comes before this one.
    """

    other: str
    values: Mapping[Hashable, Sequence[Any]]


@dataclass(frozen=True)
class Pictures:
    """Images to browse; the choice is the place of one, from 0.

    Attributes
    ----------
    thumbnails
        uint8 (height, width, 3) each.
    names
        What each shows.
    """

    thumbnails: Sequence[np.ndarray]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.thumbnails)


Values = Sequence[Any] | DependsOn | Pictures


def explore(
    plot: Plot,
    *,
    shown: Mapping[str, Sequence[Any]] | None = None,
    caption: str | None = None,
    **choices: Values,
) -> Widget | Figure:
    """Show ``plot(**choice)`` for a choice that a person makes, or for a few of them.

    In JupyterLab this is a panel: ascending whole numbers are a slider, other values a list to
    pick from, :class:`Pictures` a browser of images; the figure follows. Headless, and outside
    notebooks, it is one figure with the plots of a few choices side by side, and no widget.

    Parameters
    ----------
    plot
        A function of the choices, by name, to a figure. :func:`of_table` makes one of a plot and
        its table.
    shown
        Values for the static grid, by the name of a choice; without them evenly spaced ones, in
        all not more than :data:`FIGURES` figures.
    caption
        What stands below.
    choices
        Values of each choice by its name: a sequence, :class:`DependsOn` or :class:`Pictures`.

    Raises
    ------
    MoeeError
        No choice, one without values, one that depends on a choice that does not come before it,
        or values to be shown that are none of a choice.

    Examples
    --------
    >>> table = measure.class_routing(run, images)
    >>> explore(
    ...     of_table(plots.class_routing, table),
    ...     layer=values_of(table, "layer"),
    ...     class_name=values_of(table, "class_name"),
    ... )
    """
    _check(choices)
    if is_in_notebook() and not is_headless():
        from moee_analysis.report.explore_widgets import panel

        return panel(plot, choices, caption)
    few = list(itertools.islice(_combinations(choices, shown or {}), FIGURES))
    return sheet([plot(**choice) for choice in few], caption=caption)


def of_table(plot: Plot, table: pd.DataFrame, **options: Any) -> Plot:
    """Return a plot of the rows of ``table`` whose columns have the values that are chosen.

    The names of choices are columns. ``options`` go to ``plot`` as they are.
    """

    def drawn(**choice: Any) -> Figure:
        rows = table
        for column, value in choice.items():
            rows = rows[rows[column] == value]
        rows.attrs = {}  # one caption below all
        return plot(rows, **options)

    return drawn


def values_of(table: pd.DataFrame, column: str, *, by: str | None = None) -> Values:
    """Values of a column in order of appearance; ``by`` another column: those of each of its own.

    Raises
    ------
    MoeeError
        A column that the table does not have.
    """
    for name in (column, by):
        if name is not None and name not in table:
            raise MoeeError(
                f"a column among {', '.join(map(str, table))}", f"'{name}'", "correct the name"
            )
    if by is not None:
        groups = table.groupby(by, sort=False)[column]
        return DependsOn(by, {value: part.unique().tolist() for value, part in groups})
    return table[column].unique().tolist()


def options_of(values: Values, chosen: Mapping[str, Any]) -> Sequence[Any]:
    """Return what can be chosen, once the choices before are made."""
    if isinstance(values, DependsOn):
        return values.values[chosen[values.other]]
    return range(len(values)) if isinstance(values, Pictures) else values


def _check(choices: Mapping[str, Values]) -> None:
    if not choices:
        raise MoeeError("a choice to explore", "none", "pass values by name, such as layer=[0, 1]")
    before: list[str] = []
    for name, values in choices.items():
        if isinstance(values, DependsOn) and values.other not in before:
            raise MoeeError(
                f"'{name}' after '{values.other}', which it depends on",
                f"{', '.join(before) or 'nothing'} before it", "give the choices in that order",
            )  # fmt: skip
        lists = values.values.values() if isinstance(values, DependsOn) else [values]
        if not lists or any(len(one) == 0 for one in lists):
            raise MoeeError(f"values of '{name}'", "none", "pass at least one")
        before.append(name)


def _combinations(
    choices: Mapping[str, Values], shown: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Choices for a static grid: those of ``shown``, or else some evenly spaced ones."""
    unknown = sorted(set(shown) - set(choices))
    if unknown:
        raise MoeeError(
            f"choices among {', '.join(choices)} to be shown", f"'{unknown[0]}'", "correct it"
        )
    free = sum(name not in shown for name in choices)
    taken = math.prod(len(shown[name]) for name in shown)
    each = max(1, round((FIGURES / taken) ** (1 / max(1, free)) - 0.01))
    found: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        found = [
            chosen | {name: value}
            for chosen in found
            for value in _few(name, options_of(values, chosen), shown.get(name), each)
        ]
    return found


def _few(name: str, options: Sequence[Any], wanted: Sequence[Any] | None, each: int) -> list[Any]:
    if wanted is None:
        count = min(each, len(options))
        apart = len(options) / count
        return [options[int((place + 0.5) * apart)] for place in range(count)]
    known = [value for value in wanted if value in options]
    if not known:
        raise MoeeError(
            f"values of '{name}' among {', '.join(map(str, list(options)[:8]))}",
            ", ".join(map(str, wanted)) or "none", "choose some of them",
        )  # fmt: skip
    return known
