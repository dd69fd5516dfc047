"""Weights as others saved them: prefixes are looked through, sizes and channels resampled."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.models import adapt_input_conv
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.state_dicts import load_tensors, misfits
from moee_analysis.utils.progress import tell

Tensors = dict[str, torch.Tensor]

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
"""What training scripts put before the names, preferred where a file holds several networks."""

INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What compiling, sharding and recomputing put before the names of a network's parts."""


def without_prefix(tensors: Mapping[str, torch.Tensor], names: set[str]) -> tuple[Tensors, str]:
    """Return the tensors of a network by its own ``names``, and the prefix they had in the file.

    The prefix is the one that makes most of the names fit, whatever it is. Tensors outside it
    belong to something else; only those that have one of the network's names, with a part of the
    prefix or none, are taken along.

    Raises
    ------
    MoeeError
        Two networks in the file, neither of which is preferred.
    """
    tensors = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    prefix = _prefix_of(tensors, names)
    parts = prefix.split(".")
    outer = [".".join(parts[:depth]) + "." for depth in range(len(parts) - 1, 0, -1)]
    found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    for shorter in (*outer, ""):
        for name in names - found.keys():
            if shorter + name in tensors:
                found[name] = tensors[shorter + name]
    return found, prefix


def named_as_in(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield a file's tensors by the names of ``model``: as they are, then as timm renames them."""
    own, _ = without_prefix(tensors, set(model.state_dict()))
    yield own
    yield _filtered(model, own)


def fit_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load weights into ``model``, resampled as timm does where sizes or channels are others.

    Raises
    ------
    MoeeError
        What does not fit, by name: what is missing, surplus or of another shape, and the prefix
        that was looked through.
    """
    fitted, prefix = without_prefix(tensors, set(model.state_dict()))
    _tell_left(tensors, fitted, prefix, source)
    if misfits(model, fitted):
        fitted = _resampled(model, fitted, source)
    wrong = misfits(model, fitted)
    if not wrong:
        load_tensors(model, fitted, source=source)
        return
    through = f", looked for behind the prefix '{prefix}'" if prefix else ""
    raise MoeeError(
        f"the tensors of {type(model).__name__} in '{source}'{through}", wrong,
        "name the architecture that the file belongs to (--model), and its --img-size and "
        "--in-chans where they are not the usual ones; or save it with the names of timm's model",
    )  # fmt: skip


def _prefix_of(tensors: Mapping[str, torch.Tensor], names: set[str]) -> str:
    """The prefix behind which most of ``names`` stand; "" where there is none."""
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in names:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    most = max(counts.values(), default=0)
    shared = _shared_prefix(tensors)
    if (shared and counts[shared] == most) or 2 * most < len(names):  # named in another way
        return shared
    best = [prefix for prefix, count in counts.items() if count == most]
    averaged = [prefix for prefix in best if re.search(r"(^|[._])ema([._]|$)", prefix)]
    usual = [prefix for prefix in best if prefix == "" or _is_usual(prefix)]
    chosen = averaged or usual or best
    if len(chosen) > 1:
        networks = ", ".join(f"'{prefix}'" for prefix in chosen)
        raise MoeeError(
            "weights of one network", f"several that fit, behind {networks}",
            "save the one that is meant alone",
        )  # fmt: skip
    return chosen[0]


def _without_wrappers(name: str) -> str:
    """``name`` without what compiling and sharding put into the middle of it."""
    first, *rest = re.split(r"(?<=\.)(?=\w)", name)
    while rest and _is_usual(first) and _is_usual(first + rest[0]):
        first += rest.pop(0)
    return first + "".join(part for part in rest if part not in INSIDE)


def _shared_prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    """The longest of the usual prefixes that all names have."""
    prefix = ""
    while longer := [
        prefix + p for p in PREFIXES if all(name.startswith(prefix + p) for name in tensors)
    ]:
        prefix = longer[0]
    return prefix


def _is_usual(prefix: str) -> bool:
    rest = prefix
    while rest:
        first = next((p for p in PREFIXES if rest.startswith(p)), None)
        if first is None:
            return False
        rest = rest.removeprefix(first)
    return True


def _tell_left(
    tensors: Mapping[str, torch.Tensor], fitted: Tensors, prefix: str, source: str
) -> None:
    """Say which prefix was looked through, and how many tensors stand outside it."""
    if not prefix:
        return
    left = [name for name in tensors if not name.startswith(prefix)]
    left = [name for name in left if not any(tensors[name] is t for t in fitted.values())]
    others = f"; left {len(left)} tensors outside it, such as {left[0]}" if left else ""
    tell(f"weights: taken from behind the prefix '{prefix}' in {source}{others}")


def _resampled(model: nn.Module, tensors: Tensors, source: str) -> Tensors:
    """``tensors`` as timm's own filter for this architecture makes them fit, channels too."""
    fitted = _filtered(model, tensors)
    for name in _first_convolutions(model):
        if name in fitted:
            fitted[name] = _with_channels(fitted[name], model.get_parameter(name).shape[1])
    changed = [n for n, t in fitted.items() if n in tensors and t.shape != tensors[n].shape]
    if changed:
        told = (f"{n} {tuple(tensors[n].shape)} -> {tuple(fitted[n].shape)}" for n in changed[:3])
        tell(f"weights: resampled for this model's images: {', '.join(told)} ({source})")
    return fitted


def _filtered(model: nn.Module, tensors: Tensors) -> Tensors:
    """``tensors`` as timm's own filter for this architecture renames and resamples them."""
    module = sys.modules[type(model).__module__]
    filter_weights = getattr(module, "checkpoint_filter_fn", lambda tensors, _model: tensors)
    try:
        with _quiet_timm():
            return dict(filter_weights(dict(tensors), model))
    except Exception:  # a foreign file can break timm's filter in any way; what misfits is told
        return dict(tensors)


def _first_convolutions(model: nn.Module) -> list[str]:
    names = model.pretrained_cfg.get("first_conv") or ()
    names = [names] if isinstance(names, str) else names
    found = dict(model.named_modules())
    return [f"{name}.weight" for name in names if isinstance(found.get(name), nn.Conv2d)]


def _with_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Weights of a first convolution for so many channels, as timm adapts them; from one, too."""
    if weight.ndim != 4 or weight.shape[1] == channels:
        return weight
    if weight.shape[1] == 1:  # of equal channels, each contributes its share
        return weight.expand(-1, channels, -1, -1) / channels
    return adapt_input_conv(channels, weight) if weight.shape[1] == 3 else weight


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Timm's own lines on what it resamples are left to :func:`_resampled`."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.INFO)
        yield
    finally:
        logging.disable(before)
