"""State dicts from files: safetensors, or what training scripts save, of which tensors are read."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.files import check_file

Tensors = dict[str, torch.Tensor]

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model", "model_state_dict", "model_state", "net", "network",
            "module", "weights")  # fmt: skip
"""Keys that training scripts put a state dict under, the best first: averaged weights."""

DEEP = 3  # wrappers within each other
HARMLESS = [
    argparse.Namespace, np.dtype, np.ndarray, np._core.multiarray.scalar,
    np._core.multiarray._reconstruct, *{type(np.dtype(t)) for t in "?bBhHiIlLqQefd"},
]  # fmt: skip
"""Plain data beside the weights: the options of a training, NumPy's numbers."""


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read a state dict and its metadata from ``.safetensors``, or from a checkpoint of PyTorch's.

    Of a checkpoint the weights are found by the usual names, averaged ones (EMA) preferred, which
    is told. Nothing but tensors and plain data is ever read.

    Raises
    ------
    MoeeError
        No file, or one that cannot be read, is truncated or foreign.
    """
    check_file(path, expected="a weights file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise MoeeError("a weights file that can be read", str(error), "check the path") from None
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_checkpoint(path), {}


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load a complete state dict into ``model``; every name and shape must fit.

    Raises
    ------
    MoeeError
        Names or shapes differ; the message lists the first three of each kind.
    """
    wrong = misfits(model, tensors)
    if wrong:
        raise MoeeError(
            f"the tensors of {type(model).__name__} in '{source}'", wrong,
            "check that the file belongs to this architecture (--model) and its settings",
        )  # fmt: skip
    model.load_state_dict(tensors)


def misfits(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> str:
    """What of ``tensors`` does not fit ``model``, as :func:`differences` tells it; "" if none."""
    return differences(model.state_dict(), tensors)


def differences(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes in which ``tensors`` differ: three of each kind, and how many; or ""."""
    own = {name: tuple(t.shape) for name, t in expected.items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    both = own.keys() & given.keys()
    kinds = {
        "missing": [name for name in own if name not in given],
        "not in the model": [name for name in given if name not in own],
        "of another shape": [
            f"{name} is {given[name]}, not {own[name]}"
            for name in own
            if name in both and given[name] != own[name]
        ],
    }
    return "; ".join(f"{kind}: {_three(names)}" for kind, names in kinds.items() if names)


def _three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MoeeError(
            f"a complete safetensors file at '{path}'", str(error), "fetch or save it again"
        ) from None


def _read_checkpoint(path: Path) -> Tensors:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MoeeError(
            f"a checkpoint of tensors and plain data at '{path}'", _foreign(error), SAVE_ALONE
        ) from None
    except Exception as error:  # a damaged file can break the reader in any way
        raise MoeeError(
            f"a checkpoint of tensors at '{path}'",
            f"something else ({type(error).__name__})",
            f"fetch or save it again; else {SAVE_ALONE}",
        ) from None
    return _state_dict(content, path)


SAVE_ALONE = (
    "save the state dict alone, where the file was made: save model.state_dict(), best by "
    "safetensors.torch.save_file"
)


def _foreign(error: Exception) -> str:
    """What the reader refused, by its name."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"an object of {named[1]}" if named else "something else"
    return f"{what}, which could run code when it is read (UnpicklingError)"


def _state_dict(content: Any, path: Path) -> Tensors:
    """The weights of a checkpoint, inside the wrappers that training scripts put around them."""
    passed: list[str] = []
    for _ in range(DEEP):
        key = _wrapper(content)
        if key is None:
            break
        passed.append(key)
        content = content[key]
    tensors = _tensors_in(content)
    if not tensors:
        keys = list(map(str, content)) if isinstance(content, Mapping) else []
        listed = f" with the keys {_three(keys)}" if keys else ""
        where = "".join(f"['{key}']" for key in passed)
        raise MoeeError(
            f"a state dict (name -> tensor) in '{path}', or under one of {', '.join(WRAPPERS)}",
            f"a {type(content).__name__}{listed}{f' in {where}' if where else ''}", SAVE_ALONE,
        )  # fmt: skip
    for key in set(passed) & set(AVERAGED):
        tell(f"weights: those of '{key}' in {path.name}, the averaged ones (EMA)")
    return tensors


def _wrapper(content: Any) -> str | None:
    """The key of a state dict, or of a further wrapper, in ``content``; None: it is one itself."""
    if not isinstance(content, Mapping):
        return None
    beside = len(_tensors_in(content))  # such as the best accuracy
    return next((k for k in WRAPPERS if _most_tensors(content.get(k)) > beside), None)


def _most_tensors(content: Any, depth: int = DEEP) -> int:
    """Tensors of the largest state dict in ``content`` or in the wrappers within it."""
    if not isinstance(content, Mapping) or not depth:
        return 0
    within = (_most_tensors(content.get(key), depth - 1) for key in WRAPPERS)
    return max(len(_tensors_in(content)), *within)


def _tensors_in(content: Any) -> Tensors:
    if not isinstance(content, Mapping):
        return {}
    return {name: t for name, t in content.items() if isinstance(name, str) and torch.is_tensor(t)}
