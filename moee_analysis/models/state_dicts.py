"""State dicts from files: safetensors, or the checkpoints of training scripts, their tensors.

The hub of pretrained weights: asked where it answers, else only its cache on this machine.
"""

import argparse
import pickle
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from huggingface_hub import constants as hub
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

SAVE_ALONE = (
    "save the state dict alone, where the file was made: save model.state_dict(), best by "
    "safetensors.torch.save_file"
)


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read a state dict and its metadata from ``.safetensors``, or from a checkpoint of PyTorch's.

    Of a checkpoint the weights are found by the usual names, averaged ones (EMA) preferred. Nothing
    but tensors and plain data is ever read.
    """
    check_file(path, expected="a weights file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise MoeeError("a weights file that can be read", str(error), "check the path") from None
    if path.suffix != ".safetensors":
        return _state_dict(_read_checkpoint(path), path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MoeeError(
            f"a complete safetensors file at '{path}'", str(error), "fetch or save it again"
        ) from None


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load a complete state dict into ``model``; refuse one of other names or shapes."""
    wrong = differences(model.state_dict(), tensors)
    if wrong:
        raise MoeeError(
            f"the tensors of {type(model).__name__} in '{source}'", wrong,
            "check that the file belongs to this architecture (--model) and its settings",
        )  # fmt: skip
    model.load_state_dict(tensors)


def differences(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes in which ``tensors`` differ: three of each kind, and how many; or ""."""
    own = {name: tuple(t.shape) for name, t in expected.items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    kinds = {
        "missing": [name for name in own if name not in given],
        "not in the model": [name for name in given if name not in own],
        "of another shape": [
            f"{name} is {given[name]}, not {shape}"
            for name, shape in own.items()
            if given.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{kind}: {_three(names)}" for kind, names in kinds.items() if names)


def _three(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_checkpoint(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"an object of {named[1]}" if named else "something else"
        raise MoeeError(
            f"a checkpoint of tensors and plain data at '{path}'",
            f"{found}, which could run code when it is read (UnpicklingError)", SAVE_ALONE,
        ) from None  # fmt: skip
    except Exception as error:  # a damaged file can break the reader in any way
        raise MoeeError(
            f"a checkpoint of tensors at '{path}'",
            f"something else ({type(error).__name__})",
            f"fetch or save it again; else {SAVE_ALONE}",
        ) from None


def _state_dict(content: Any, path: Path) -> Tensors:
    """The weights of a checkpoint, inside the wrappers that training scripts put around them."""
    tensors, passed = _unwrap(content)
    if not tensors:
        keys = map(str, content) if isinstance(content, Mapping) and content else None
        raise MoeeError(
            f"a state dict (name -> tensor) in '{path}', or under one of {', '.join(WRAPPERS)}",
            f"a {type(content).__name__}" + (f" with the keys {_three(keys)}" if keys else ""),
            SAVE_ALONE,
        )
    for key in set(passed) & set(AVERAGED):
        tell(f"weights: those of '{key}' in {path.name}, the averaged ones (EMA)")
    return tensors


def _unwrap(content: Any, depth: int = DEEP) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of ``content``, or of the first wrapper in it that has more; the keys to them."""
    if not isinstance(content, Mapping):
        return {}, ()
    own = {n: t for n, t in content.items() if isinstance(n, str) and torch.is_tensor(t)}
    for key in WRAPPERS if depth else ():
        inner, keys = _unwrap(content.get(key), depth - 1)
        if len(inner) > len(own):  # beside a state dict stand single numbers
            return inner, (key, *keys)
    return own, ()


@contextmanager
def hub_access() -> Iterator[None]:
    """While open, the hub's client looks in its cache alone if the hub cannot be reached."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not _hub_answers()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    """Whether the hub can be reached; saves its client a minute of retries when it cannot."""
    if getproxies():
        return True
    try:
        socket.create_connection((urlsplit(hub.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True
