"""The alternative text of figures: what a plot shows in words, with the numbers that count."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pandas as pd

from moee_analysis.errors import MoeeError

Form = Callable[[float], str]
Text = Callable[..., str]

_OF_PLOTS: dict[Callable[..., object], Text] = {}


def describes(
    plot: Callable[..., object], beginning: str = "", *, by: str = "system"
) -> Callable[[Text], Text]:
    """Let the decorated function say in a sentence or two what ``plot`` shows of the same table.

    With a ``beginning`` it goes on from there, of the rows of each system or of each value of
    ``by``.
    """

    def note(function: Text) -> Text:
        def each(table: pd.DataFrame) -> str:
            return f"{beginning}: {of_each(table, function, by)}."

        _OF_PLOTS[plot] = each if beginning else function
        return function

    return note


def describe(plot: Callable[..., object], *given: Any) -> str:
    """Say what ``plot`` shows of a table; a plot that nothing describes raises `MoeeError`."""
    if plot not in _OF_PLOTS:
        raise MoeeError(
            "a function that describes the plot",
            f"none for '{getattr(plot, '__name__', plot)}'",
            "decorate one with @describes(plot), or give the figure's finding as text",
        )
    return _OF_PLOTS[plot](*given)


def number(value: float, digits: int = 2) -> str:
    """``value`` with so many decimals, and a minus sign that is read as one."""
    return "unknown" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


whole = partial(number, digits=0)
bits = partial(number, digits=3)  # divergences are small


def percent(share: float) -> str:
    """A share, 0 to 1, as ``85.0 %``."""
    return "unknown" if pd.isna(share) else f"{number(100 * share, 1)} %"


def points(difference: float) -> str:
    """A difference of shares as ``+1.3`` percentage points."""
    return "unknown" if pd.isna(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def change(now: float, dense: float) -> str:
    """How much smaller or larger ``now`` is, as ``−28.0 %``."""
    share = now / dense - 1 if dense else float("nan")
    return points(share) if pd.isna(share) else f"{points(share)} %"


def count(number: int, what: str) -> str:
    """``1 cluster``, ``2 clusters``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def span(values: pd.Series, form: Form = number) -> str:
    """The smallest and the largest of ``values``, as ``3 to 7``; one number if they are alike."""
    low, high = form(values.min()), form(values.max())
    return low if low == high else f"{low} to {high}"


def course(rows: pd.DataFrame, value: str, form: Form = number) -> str:
    """The range of a column over the layers, and the layer in which it is highest, if in one."""
    top, text = largest(rows, value), span(rows[value], form)
    varies = top is not None and rows["layer"].nunique() > 1 and text != form(top[value])
    return f"{text} (highest in layer {top['layer']})" if varies else text


def largest(rows: pd.DataFrame, value: str) -> pd.Series | None:
    """The row of the largest known ``value``, the first of several; None if none is known."""
    known = rows.dropna(subset=value)
    return known.iloc[known[value].argmax()] if len(known) else None


def smallest(rows: pd.DataFrame, value: str) -> pd.Series | None:
    """The row of the smallest known ``value``, the first of several; None if none is known."""
    known = rows.dropna(subset=value)
    return known.iloc[known[value].argmin()] if len(known) else None


def where(row: pd.Series, table: pd.DataFrame) -> str:
    """The layer of ``row``, and its system where ``table`` has several."""
    system = f" of {row['system']}" if table["system"].nunique() > 1 else ""
    return f"layer {row['layer']}{system}"


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``; nothing is unknown."""
    *first, last = list(parts) or ["unknown"]
    return f"{', '.join(first)} and {last}" if first else last


def of_each(table: pd.DataFrame, text: Callable[[pd.DataFrame], str], by: str = "system") -> str:
    """The ``text`` of every system, one after the other, each by its name."""
    return "; ".join(f"{name} {text(rows)}" for name, rows in table.groupby(by, sort=False))


def beyond(
    rows: pd.DataFrame, value: str, chance: str, *, null: str = "null_high",
    shown: str | None = None, form: Form = number,
) -> str:  # fmt: skip
    """The course of ``shown`` over the layers, and in how many ``value`` exceeds ``null``."""
    above = (rows[value] > rows[null]).sum()
    return f"{course(rows, shown or value, form)}, beyond {chance} in {above} of {len(rows)} layers"


def sentence(text: str) -> str:
    """``text`` with a capital at the beginning and a full stop at the end."""
    return f"{text[:1].upper()}{text[1:]}."
