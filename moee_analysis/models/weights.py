"""Weights from safetensors and others' checkpoints, and the hub that some are fetched from."""

import argparse
import logging
import os
import pickle
import re
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from huggingface_hub import constants as hub
from timm.models import adapt_input_conv
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import switched
from moee_analysis.models.unwrapping import stated_modules
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.checksums import Tensors, read_safetensors
from moee_analysis.utils.storage.files import check_file

# Keys that training scripts put a state dict under, the best first: averaged weights
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGED, "state_dict", "model", "model_state_dict", "model_state", "net", "network",
            "module", "weights")  # fmt: skip
DEEP = 3  # wrappers within each other
HARMLESS = [  # plain data beside the weights: the options of a training, NumPy's numbers
    argparse.Namespace, np.dtype, np.ndarray, np._core.multiarray.scalar,
    np._core.multiarray._reconstruct, *{type(np.dtype(t)) for t in "?bBhHiIlLqQefd"},
]  # fmt: skip
SAVE_ALONE = (
    "save the state dict alone, where the file was made: save model.state_dict(), best by "
    "safetensors.torch.save_file"
)
NAME_IT = (
    "name the architecture that the file belongs to (--model), and its --img-size and --in-chans "
    "where they are not the usual ones; or save it with the names of timm's model"
)
# What training scripts put before the names, preferred where a file holds several networks
USUAL = r"(?:module|_orig_mod|model|backbone|encoder)\."
# What compiling, sharding and recomputing put before the names of a network's parts
INSIDE = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read a state dict and its metadata; of a checkpoint the averaged weights (EMA) first."""
    check_file(path, expected="a weights file")
    if path.suffix != ".safetensors":
        return _state_dict(_read_checkpoint(path), path), {}
    expected = f"a complete safetensors file at '{path}'"
    return read_safetensors(path, expected=expected, hint="fetch or save it again")


def _read_checkpoint(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"an object of {named[1]}" if named else "something else"
        found, hint = f"{found}, which could run code when it is read (UnpicklingError)", SAVE_ALONE
    except Exception as error:  # a damaged file can break the reader in any way
        found = f"something else ({type(error).__name__})"
        hint = f"fetch or save it again; else {SAVE_ALONE}"
    raise MoeeError(f"a checkpoint of tensors and plain data at '{path}'", found, hint)


def _state_dict(content: Any, path: Path) -> Tensors:
    """The weights of a checkpoint, inside the wrappers that training scripts put around them."""
    tensors, passed = _unwrap(content)
    if not tensors:
        expected = f"a state dict (name -> tensor) in '{path}', or under one of "
        found = f"a {type(content).__name__}"
        if isinstance(content, Mapping) and content:
            found += f" with the keys {_three([*map(str, content)])}"
        raise MoeeError(expected + ", ".join(WRAPPERS), found, SAVE_ALONE)
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


def fit_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load weights into ``model``, resampled as timm does where sizes or channels are others.

    Raises MoeeError: several networks in the file; tensors missing, surplus or of another shape.
    """
    expected = model.state_dict()
    fitted, prefix = _without_prefix(tensors, set(expected))
    if prefix:
        taken = set(map(id, fitted.values()))
        left = [n for n, t in tensors.items() if id(t) not in taken and not n.startswith(prefix)]
        others = f"; left {len(left)} tensors outside it, such as {left[0]}" if left else ""
        tell(f"weights: taken from behind the prefix '{prefix}' in {source}{others}")
    if differences(expected, fitted):
        fitted = _resample(model, fitted, source)
    if wrong := differences(expected, fitted):
        through = f", looked for behind the prefix '{prefix}'" if prefix else ""
        asked = f"the tensors of {type(model).__name__} in '{source}'{through}"
        raise MoeeError(asked, wrong, NAME_IT)
    model.load_state_dict(fitted)


def count_classes_in(tensors: Tensors, model: nn.Module, path: Path) -> int:
    """How many classes the weights in a file tell apart; 0 where they are of no classifier."""
    heads = tuple(f"{head}." for head in stated_modules(model, "classifier"))
    if not heads or not model.num_classes:
        return model.num_classes
    own, _ = _without_prefix(tensors, set(model.state_dict()))
    for rename in (dict, partial(_filter, model)):  # as they are called, then as timm has them
        named = rename(own)
        given = [named[f"{head}weight"] for head in heads if f"{head}weight" in named]
        if given:
            return len(given[0])
        if any(name.startswith(heads) for name in named):
            return model.num_classes
    tell(f"weights: no classifier in {path}: a model of features (num_classes=0)")
    return 0


def differences(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes in which ``tensors`` differ: three of each kind, and how many; or ""."""
    own = {name: tuple(t.shape) for name, t in expected.items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    kinds = {
        "missing": [name for name in own if name not in given],
        "not in the model": [name for name in given if name not in own],
        "of another shape": [
            f"{n} is {given[n]}, not {s}" for n, s in own.items() if given.get(n, s) != s
        ],
    }
    return "; ".join(f"{kind}: {_three(names)}" for kind, names in kinds.items() if names)


def _three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _without_prefix(tensors: Mapping[str, torch.Tensor], names: set[str]) -> tuple[Tensors, str]:
    """The tensors of a network by its own ``names``, and the prefix they had in the file.

    Of tensors outside it, those with one of the ``names`` behind a part of it are taken along.
    """
    tensors = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    prefix = _find_prefix(tensors, names)
    found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    parts = prefix.split(".")[:-1]
    for depth in reversed(range(len(parts))):
        shorter = "".join(f"{part}." for part in parts[:depth])
        found = {n: tensors[shorter + n] for n in names if shorter + n in tensors} | found
    return found, prefix


def _without_wrappers(name: str) -> str:
    """``name`` without what compiling and sharding put into the middle of it."""
    first = re.match(rf"(?:{USUAL})+|[^.]*\.?", name)[0]
    return first + re.sub(INSIDE, "", name[len(first) :])


def _find_prefix(tensors: Mapping[str, torch.Tensor], names: set[str]) -> str:
    """The prefix behind which most of ``names`` stand; "" where there is none."""
    counts = Counter(
        "".join(f"{part}." for part in key[:depth])
        for key in (name.split(".") for name in tensors)
        for depth in range(len(key))
        if ".".join(key[depth:]) in names
    )
    most = max(counts.values(), default=0)
    common = os.path.commonprefix(list(tensors))  # noqa: RUF071 (of characters is meant)
    shared = re.match(f"(?:{USUAL})*", common)[0]
    if (shared and counts[shared] == most) or 2 * most < len(names):  # named in another way
        return shared
    best = [prefix for prefix, count in counts.items() if count == most]
    averaged = [prefix for prefix in best if re.search(r"(^|[._])ema([._]|$)", prefix)]
    usual = [prefix for prefix in best if re.fullmatch(f"(?:{USUAL})*", prefix)]
    chosen = averaged or usual or best
    if len(chosen) > 1:
        found = f"several that fit, behind {', '.join(map(repr, chosen))}"
        raise MoeeError("weights of one network", found, "save the one that is meant alone")
    return chosen[0]


def _resample(model: nn.Module, tensors: Tensors, source: str) -> Tensors:
    fitted = _filter(model, tensors)
    for name, first in stated_modules(model, "first_conv").items():
        if isinstance(first, nn.Conv2d) and f"{name}.weight" in fitted:
            fitted[f"{name}.weight"] = _adapt(fitted[f"{name}.weight"], first.weight.shape[1])
    if changed := [n for n, t in fitted.items() if n in tensors and t.shape != tensors[n].shape]:
        shapes = (f"{n} {tuple(tensors[n].shape)} -> {tuple(fitted[n].shape)}" for n in changed[:3])
        tell(f"weights: resampled for this model's images: {', '.join(shapes)} ({source})")
    return fitted


def _filter(model: nn.Module, tensors: Tensors) -> Tensors:
    """``tensors`` as timm's own filter for this architecture renames and resamples them."""
    module = sys.modules[type(model).__module__]
    filter_weights = getattr(module, "checkpoint_filter_fn", lambda tensors, _model: tensors)
    before = logging.root.manager.disable
    try:
        logging.disable(logging.INFO)  # what timm says of it is told in one line
        return dict(filter_weights(dict(tensors), model))
    except Exception:  # a foreign file can break timm's filter in any way; the misfits are named
        return dict(tensors)
    finally:
        logging.disable(before)


def _adapt(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Weights of a first convolution for so many channels, as timm adapts them; from one, too."""
    if weight.ndim != 4 or weight.shape[1] == channels:
        return weight
    if weight.shape[1] == 1:  # of equal channels, each contributes its share
        return weight.expand(-1, channels, -1, -1) / channels
    return adapt_input_conv(channels, weight) if weight.shape[1] == 3 else weight


def hub_access() -> AbstractContextManager[None]:
    """While open, the hub's client looks in its cache alone if the hub cannot be reached."""
    return switched([hub], HF_HUB_OFFLINE=hub.HF_HUB_OFFLINE or not _hub_answers())


def _hub_answers() -> bool:
    """Whether the hub can be reached; saves its client a minute of retries when it cannot."""
    if getproxies():
        return True
    with suppress(OSError):
        socket.create_connection((urlsplit(hub.ENDPOINT).hostname, 443), timeout=5).close()
        return True
    return False
