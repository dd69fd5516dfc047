"""Tables and routes as JSON, and back again to the last bit."""

import base64
from functools import singledispatch
from typing import Any

import numpy as np
import pandas as pd

from moee_analysis.measure.routing.routes import Routes


@singledispatch
def encode(value: Any) -> Any:
    """Return ``value`` in plain JSON values; a TypeError: it is none of those that can be kept."""
    if isinstance(value, str | int | None):
        return value
    raise TypeError(f"{type(value).__name__} is not kept")


@encode.register
def _(value: float) -> Any:
    return {"float": float(value).hex()}  # JSON knows neither nan nor what is infinite


@encode.register
def _(value: np.generic) -> Any:
    return {"scalar": encode(np.asarray(value))}


@encode.register
def _(value: np.ndarray) -> Any:
    if value.dtype == object:
        return {"objects": [encode(each) for each in value]}
    text = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"bytes": text, "dtype": value.dtype.str, "shape": list(value.shape)}


@encode.register
def _(value: list) -> Any:
    return [encode(each) for each in value]


@encode.register
def _(value: tuple) -> Any:
    return {"tuple": [encode(each) for each in value]}


@encode.register
def _(value: dict) -> Any:
    return {"items": [[encode(key), encode(each)] for key, each in value.items()]}


@encode.register
def _(value: Routes) -> Any:
    return {"routes": encode(vars(value))}


@encode.register
def _(value: pd.DataFrame) -> Any:
    if not value.index.equals(pd.RangeIndex(len(value))) or value.columns.nlevels > 1:
        raise TypeError("a table whose rows have names is not kept")
    columns = [[name, str(each.dtype), encode(each.to_numpy())] for name, each in value.items()]
    return {"table": columns, "attrs": encode(value.attrs)}


def decode(content: Any) -> Any:
    """Return what :func:`encode` was given."""
    if isinstance(content, list):
        return [decode(each) for each in content]
    if not isinstance(content, dict):
        return content
    kind, inside = next(iter(content.items()))
    return DECODE[kind](inside, content)


def _decode_table(columns: list, content: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame({name: decode(values) for name, _, values in columns})
    table = table.astype({name: dtype for name, dtype, _ in columns})
    table.attrs = decode(content["attrs"])
    return table


def _decode_objects(values: list, _: dict[str, Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = [decode(each) for each in values]
    return array


def _decode_array(text: str, content: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(text), content["dtype"])
    return flat.reshape(content["shape"]).copy()


DECODE = {
    "table": _decode_table,
    "routes": lambda inside, _: Routes(**decode(inside)),
    "objects": _decode_objects,
    "bytes": _decode_array,
    "scalar": lambda inside, _: decode(inside)[()],
    "items": lambda inside, _: {decode(key): decode(each) for key, each in inside},
    "tuple": lambda inside, _: tuple(map(decode, inside)),
    "float": lambda inside, _: float.fromhex(inside),
}
"""By its first key, what makes a value of JSON."""
