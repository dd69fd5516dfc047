"""Tables of layers and of pairs, and the order of rows in a heat map."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


def add_caption(table: pd.DataFrame, caption: str) -> pd.DataFrame:
    """``table`` with a caption for the figure that is made of it."""
    table.attrs["caption"] = caption
    return table


def all_rows(**columns: Iterable) -> pd.DataFrame:
    """A row for every combination of the values of the columns, the last changing fastest."""
    index = pd.MultiIndex.from_product([list(each) for each in columns.values()], names=columns)
    return index.to_frame(index=False)


def stack(parts: Iterable[tuple], by: Sequence[str] = ("system", "layer")) -> pd.DataFrame:
    """One table of many; a part is the values of the columns ``by``, which come first, and one."""
    tables = []
    for *values, table in parts:
        for place, (name, value) in enumerate(zip(by, values, strict=True)):
            table.insert(place, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def sum_up(table: pd.DataFrame, describe: Callable[[pd.DataFrame], dict]) -> pd.DataFrame:
    """A row for each system and layer of ``table``, of what ``describe`` says of its rows."""
    groups = table.groupby(["system", "layer"], sort=False)
    return pd.DataFrame([{"system": s, "layer": n} | describe(part) for (s, n), part in groups])


def order_alike(points: np.ndarray, *, distances: bool = False) -> np.ndarray:
    """Place of each row when like rows stand side by side, by average linkage.

    ``points`` are (n, features), or ``distances`` (n, n).
    """
    if len(points) < 3:
        return np.arange(len(points))
    if distances:
        points = squareform(points * (1 - np.eye(len(points))), checks=False)
    return np.argsort(leaves_list(linkage(points, "average", optimal_ordering=True)))
