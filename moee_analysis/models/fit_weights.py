"""Weights as others saved them: prefixes are looked through, sizes and channels resampled."""

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.models import adapt_input_conv
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.state_dicts import Tensors, differences, load_tensors
from moee_analysis.models.unwrapping import stated_modules
from moee_analysis.utils.progress import tell

USUAL = r"(?:module|_orig_mod|model|backbone|encoder)\."
"""What training scripts put before the names, preferred where a file holds several networks."""

INSIDE = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
"""What compiling, sharding and recomputing put before the names of a network's parts."""


def named_as_in(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[Tensors]:
    """Yield a file's tensors by the names of ``model``: as they are, then as timm renames them."""
    own, _ = without_prefix(tensors, set(model.state_dict()))
    yield own
    yield _filtered(model, own)


def fit_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load weights into ``model``, resampled as timm does where sizes or channels are others.

    Raises MoeeError: two networks in the file; tensors that are missing, surplus or of another
    shape.
    """
    expected = model.state_dict()
    fitted, prefix = without_prefix(tensors, set(expected))
    if prefix:
        left = [n for n, t in tensors.items() if not any(t is own for own in fitted.values())]
        left = [n for n in left if not n.startswith(prefix)]
        others = f"; left {len(left)} tensors outside it, such as {left[0]}" if left else ""
        tell(f"weights: taken from behind the prefix '{prefix}' in {source}{others}")
    if differences(expected, fitted):
        fitted = _resampled(model, fitted, source)
    wrong = differences(expected, fitted)
    if not wrong:
        load_tensors(model, fitted, source=source)
        return
    through = f", looked for behind the prefix '{prefix}'" if prefix else ""
    raise MoeeError(
        f"the tensors of {type(model).__name__} in '{source}'{through}", wrong,
        "name the architecture that the file belongs to (--model), and its --img-size and "
        "--in-chans where they are not the usual ones; or save it with the names of timm's model",
    )  # fmt: skip


def without_prefix(tensors: Mapping[str, torch.Tensor], names: set[str]) -> tuple[Tensors, str]:
    """Return the tensors of a network by its own ``names``, and the prefix they had in the file.

    The prefix is the one that makes most of the names fit, whatever it is. Tensors outside it
    belong to something else; only those that have one of the network's names, with a part of the
    prefix or none, are taken along.
    """
    tensors = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    prefix = _find_prefix(tensors, names)
    found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts) - 1, -1, -1):
        shorter = "".join(f"{part}." for part in parts[:depth])
        missing = names - found.keys()
        found |= {name: tensors[shorter + name] for name in missing if shorter + name in tensors}
    return found, prefix


def _without_wrappers(name: str) -> str:
    """``name`` without what compiling and sharding put into the middle of it."""
    first = re.match(rf"(?:{USUAL})+|[^.]*\.?", name)[0]
    return first + re.sub(INSIDE, "", name[len(first) :])


def _find_prefix(tensors: Mapping[str, torch.Tensor], names: set[str]) -> str:
    """The prefix behind which most of ``names`` stand; "" where there is none."""
    parts = [key.split(".") for key in tensors]
    counts = Counter(
        "".join(f"{part}." for part in key[:depth])
        for key in parts
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
        networks = ", ".join(f"'{prefix}'" for prefix in chosen)
        raise MoeeError(
            "weights of one network", f"several that fit, behind {networks}",
            "save the one that is meant alone",
        )  # fmt: skip
    return chosen[0]


def _resampled(model: nn.Module, tensors: Tensors, source: str) -> Tensors:
    """``tensors`` as timm's own filter for this architecture makes them fit, channels too."""
    fitted = _filtered(model, tensors)
    for name, first in stated_modules(model, "first_conv").items():
        if isinstance(first, nn.Conv2d) and f"{name}.weight" in fitted:
            fitted[f"{name}.weight"] = _adapt(fitted[f"{name}.weight"], first.weight.shape[1])
    changed = [n for n, t in fitted.items() if n in tensors and t.shape != tensors[n].shape]
    if changed:
        shapes = (f"{n} {tuple(tensors[n].shape)} -> {tuple(fitted[n].shape)}" for n in changed[:3])
        tell(f"weights: resampled for this model's images: {', '.join(shapes)} ({source})")
    return fitted


def _filtered(model: nn.Module, tensors: Tensors) -> Tensors:
    """``tensors`` as timm's own filter for this architecture renames and resamples them."""
    module = sys.modules[type(model).__module__]
    filter_weights = getattr(module, "checkpoint_filter_fn", lambda tensors, _model: tensors)
    try:
        with _quiet_timm():
            return dict(filter_weights(dict(tensors), model))
    except Exception:  # a foreign file can break timm's filter in any way; the misfits are named
        return dict(tensors)


def _adapt(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Weights of a first convolution for so many channels, as timm adapts them; from one, too."""
    if weight.ndim != 4 or weight.shape[1] == channels:
        return weight
    if weight.shape[1] == 1:  # of equal channels, each contributes its share
        return weight.expand(-1, channels, -1, -1) / channels
    return adapt_input_conv(channels, weight) if weight.shape[1] == 3 else weight


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Leave timm's own lines on resampling to :func:`_resampled`."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.INFO)
        yield
    finally:
        logging.disable(before)
