"""Tables and routes as JSON, and back again to the last bit."""

import base64
from typing import Any

import numpy as np
import pandas as pd

from moee_analysis.measure.routing.routes import Routes


def encode(value: Any) -> Any:
    """Return ``value`` in plain JSON values; a TypeError: it is none of those that can be kept."""
    if isinstance(value, list):
        return [encode(each) for each in value]
    for name, (kind, parts_of, _) in KINDS.items():
        if isinstance(value, kind):
            return {name: encode(parts_of(value))}
    if isinstance(value, str | int | None):
        return value
    raise TypeError(f"{type(value).__name__} is not kept")


def decode(content: Any) -> Any:
    """Return what :func:`encode` was given."""
    if isinstance(content, list):
        return [decode(each) for each in content]
    if not isinstance(content, dict):
        return content
    ((name, parts),) = content.items()
    return KINDS[name][2](decode(parts))


def _array_parts(array: np.ndarray) -> list:
    flat = array.ravel()
    content = list(flat) if array.dtype == object else base64.b64encode(flat.tobytes()).decode()
    return [array.dtype.str, list(array.shape), content]


def _make_array(parts: list) -> np.ndarray:
    dtype, shape, content = parts
    if isinstance(content, str):
        return np.frombuffer(base64.b64decode(content), dtype).reshape(shape).copy()
    array = np.empty(len(content), dtype)
    array[:] = content
    return array.reshape(shape)


def _table_parts(table: pd.DataFrame) -> list:
    if not table.index.equals(pd.RangeIndex(len(table))) or table.columns.nlevels > 1:
        raise TypeError("a table whose rows have names is not kept")
    columns = [[name, str(each.dtype), each.to_numpy()] for name, each in table.items()]
    return [columns, table.attrs]


def _make_table(parts: list) -> pd.DataFrame:
    columns, attrs = parts
    table = pd.DataFrame({name: values for name, _, values in columns})
    table = table.astype({name: dtype for name, dtype, _ in columns})
    table.attrs = attrs
    return table


KINDS = {
    "table": (pd.DataFrame, _table_parts, _make_table),
    "routes": (Routes, vars, lambda fields: Routes(**fields)),
    "array": (np.ndarray, _array_parts, _make_array),
    "scalar": (np.generic, np.asarray, lambda array: array[()]),
    "items": (dict, lambda value: [list(pair) for pair in value.items()], dict),
    "tuple": (tuple, list, tuple),
    "float": (float, float.hex, float.fromhex),  # JSON knows neither nan nor what is infinite
}
"""What is no value of JSON, by name: its type, what it is made of, and how it is made of that."""
