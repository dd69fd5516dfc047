"""Numbers of a table in words: shares, ranges, where the largest is. Nothing known stays unsaid."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import pandas as pd

UNKNOWN = "unknown"
"""What is said of a number that is NaN."""


def number(value: float, digits: int = 2) -> str:
    """``value`` with so many decimals, and a minus sign that is read as one."""
    return UNKNOWN if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


def whole(value: float) -> str:
    """``value`` as a whole number."""
    return number(value, 0)


def bits(value: float) -> str:
    """``value`` with three decimals: divergences are small."""
    return number(value, 3)


def percent(share: float) -> str:
    """A share, 0 to 1, as ``85.0 %``."""
    return UNKNOWN if pd.isna(share) else f"{number(100 * share, 1)} %"


def change(now: float, dense: float) -> str:
    """How much smaller or larger ``now`` is, as ``−28.0 %``."""
    share = now / dense - 1 if dense else float("nan")
    return UNKNOWN if pd.isna(share) else f"{100 * share:+.1f} %".replace("-", "−")


def points(difference: float) -> str:
    """A difference of shares as ``+1.3`` percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def span(values: pd.Series, form: Callable[[float], str] = number) -> str:
    """The smallest and the largest of ``values``, as ``3 to 7``; one number if they are alike."""
    low, high = form(values.min()), form(values.max())
    return low if low == high else f"{low} to {high}"


def course(rows: pd.DataFrame, value: str, form: Callable[[float], str] = number) -> str:
    """The range of a column over the layers, and the layer in which it is highest, if in one."""
    top, told = largest(rows, value), span(rows[value], form)
    varies = top is not None and rows["layer"].nunique() > 1 and told != form(top[value])
    return f"{told} (highest in layer {top['layer']})" if varies else told


def largest(rows: pd.DataFrame, value: str) -> pd.Series | None:
    """The row of the largest known ``value``, the first of several; None if none is known."""
    known = rows.dropna(subset=value).reset_index(drop=True)
    return known.loc[known[value].idxmax()] if len(known) else None


def smallest(rows: pd.DataFrame, value: str) -> pd.Series | None:
    """The row of the smallest known ``value``, the first of several; None if none is known."""
    known = rows.dropna(subset=value).reset_index(drop=True)
    return known.loc[known[value].idxmin()] if len(known) else None


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``; nothing is unknown."""
    *first, last = list(parts) or [UNKNOWN]
    return f"{', '.join(first)} and {last}" if first else last


def of_each(
    table: pd.DataFrame, tell: Callable[[pd.DataFrame], str], *, by: Hashable = "system"
) -> str:
    """What ``tell`` says of every system, one after the other, each by its name."""
    return "; ".join(f"{name} {tell(part)}" for name, part in table.groupby(by, sort=False))


def above(rows: pd.DataFrame, value: str, level: str) -> str:
    """In how many rows, such as layers, ``value`` exceeds what stands in ``level``."""
    return f"{int((rows[value] > rows[level]).sum())} of {len(rows)}"


def sentence(words: str) -> str:
    """``words`` with a capital at the beginning and a full stop at the end."""
    return f"{words[:1].upper()}{words[1:]}."
