"""What a notebook has measured before is found in the store: it runs again in seconds.

A measure is the same where its code, its versions and all that it is given are the same.
"""

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from inspect import isfunction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.models.fingerprints import fingerprint, hash_weights
from moee_analysis.utils.environment import code_version, describe_device, versions
from moee_analysis.utils.storage.files import checksum, write_json
from moee_analysis.utils.storage.store import content_key, get_or_build, present

QUICK = 0.3  # seconds below which a result is not kept
PLACES = ("store",)  # arguments that say where, and decide nothing
KEPT = "result.json"


def remembering(measures: ModuleType, store: Path) -> SimpleNamespace:
    """A module of measures, each of which finds in the ``store`` what it has measured before."""
    names = {name: each for name, each in vars(measures).items() if not name.startswith("_")}
    for name, measure in names.items():
        if isfunction(measure):  # it keeps its help and its arguments
            names[name] = wraps(measure)(partial(remember, store, measure))
    return SimpleNamespace(**names)


def remember(store: Path, measure: Callable[..., Any], /, *given: Any, **options: Any) -> Any:
    """Return what ``measure`` returns for these arguments, from the ``store`` if it is there.

    Tables, routes and rows of plain values are kept, and only those that took a while. A measure
    that is given what cannot be told from others, such as a function, is asked anew each time.
    """
    deciding = {name: value for name, value in options.items() if name not in PLACES}
    try:
        facts = [identify(each) for each in (given, deciding)]
    except (TypeError, MoeeError):  # nor is a model known that cannot be run
        return measure(*given, **options)
    name = f"{measure.__module__}.{measure.__qualname__}"
    made_by = {"code": code_version(), "versions": versions()}
    key = f"measured-{content_key(measure=name, given=facts, **made_by)}"
    if present(store / key):
        return decode(json.loads((store / key / KEPT).read_text(encoding="utf-8")))
    begun = time.monotonic()
    result = measure(*given, **options)
    if time.monotonic() - begun > QUICK:
        try:
            content = encode(result)
        except TypeError:
            return result
        get_or_build(store, key, lambda folder: write_json(folder / KEPT, content))
    return result


def identify(value: Any) -> Any:
    """Plain values that tell ``value`` from all others; a TypeError: it cannot be told."""
    for kind, facts_of in TOLD_BY:
        if isinstance(value, kind):
            return facts_of(value)
    if is_dataclass(value):
        named = {each.name: getattr(value, each.name) for each in fields(value)}
        own = {name: identify(part) for name, part in named.items() if name not in PLACES}
        return [type(value).__qualname__, own]
    return encode(value)


def _identify_network(module: nn.Module) -> Any:
    if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        raise TypeError("hooks, as of a knock-out, are not told from others")
    if hasattr(module, "pretrained_cfg"):
        device = str(next(module.parameters()).device)  # times are those of a machine
        return [fingerprint(module), describe_device(device)]
    # a part of a network, such as a router: its tensors, and plain settings
    settings = {name: _settings_of(each) for name, each in module.named_modules()}
    return [hash_weights(module), settings]


def _settings_of(module: nn.Module) -> list[str]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    return [type(module).__qualname__, str(plain)]


TOLD_BY = (
    (ImageSet, lambda images: images.fingerprint),
    (Extraction, lambda run: identify([run.model, run.config, run.layers])),
    (nn.Module, _identify_network),
    (Mapping, lambda value: [[identify(key), identify(each)] for key, each in value.items()]),
    (list | tuple | range, lambda value: [identify(each) for each in value]),
    (np.ndarray, lambda array: checksum(encode(array))),
    (pd.DataFrame, lambda table: checksum(encode(table.reset_index()))),
)
"""What tells a value from others, by its type; a dataclass by its fields."""


# Tables and routes as JSON, and back again to the last bit


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
        content = np.frombuffer(base64.b64decode(content), dtype)
    return np.array(content, dtype).reshape(shape)


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
