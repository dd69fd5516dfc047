"""Words and numbers of the sentences that describe figures: their alternative text."""

from collections.abc import Callable, Iterable
from functools import partial

import pandas as pd

Form = Callable[[float], str]


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
    value: str, chance: str, *, null: str = "null_high", shown: str = "", form: Form = number
) -> Callable[[pd.DataFrame], str]:
    """Words for the course of a column over the layers, and in how many it exceeds ``null``."""

    def words(rows: pd.DataFrame) -> str:
        above = f"{(rows[value] > rows[null]).sum()} of {len(rows)} layers"
        return f"{course(rows, shown or value, form)}, beyond {chance} in {above}"

    return words


def sentence(text: str) -> str:
    """``text`` with a capital at the beginning and a full stop at the end."""
    return f"{text[:1].upper()}{text[1:]}."
