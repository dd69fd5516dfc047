"""Which model is "the same": weights, structure, transform, and answers to one batch of images.

Weights alone do not name a model: heads, activations, pooling and the preparation of images leave
no trace in them. The answers reveal whatever the other three overlook.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating, restored
from moee_analysis.models.inputs import DOES_NOT_FIT, data_config, input_size, misfit
from moee_analysis.models.unwrapping import unwrapped

PROJECTED = 8  # numbers that are kept of the outputs for each image of the probe
CLOSE = 1e-4  # of the largest answer: what other processors and versions may make of the same model
INFINITE = 1e9  # stands for what is not finite
EXACT, ROUGH = 2.0**30, 2.0**14  # steps of the largest answer, in double and in other precision

IGNORED = ("training", "fused_attn", "checkpointing", "drop", "cache", "init")
STATED = ("architecture", "label_names", "classifier", "first_conv")


@dataclass(frozen=True)
class Identity:
    """What makes a model this one: digests of three parts, and its answers to the probe.

    Of these ``structure`` alone may differ between versions of timm and torch.
    """

    weights: str
    structure: str
    transform: str
    answers: tuple[float, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all four."""
        return _digest([self.weights, self.structure, self.transform, self.answers])

    def difference(self, other: Self) -> str:
        """Which part of ``other`` is not this model's, across versions; "" if none."""
        if self.weights != other.weights:
            return "other weights"
        if self.transform != other.transform:
            return "another preparation of the images"
        return "" if alike(self.answers, other.answers) else "other outputs for the same weights"


_KNOWN: ContextVar[dict[int, Identity]] = ContextVar("known", default={})  # noqa: B039


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """While open, these models do not change: who asks for their identities gets those of now."""
    before = _KNOWN.set({id(unwrapped(model)): identity(model) for model in models})
    try:
        yield
    finally:
        _KNOWN.reset(before)


def identity(model: nn.Module) -> Identity:
    """Look at all that decides the outputs of a model; raises as :func:`answers`."""
    network = unwrapped(model)
    if id(network) in _KNOWN.get():
        return _KNOWN.get()[id(network)]
    transform = _digest(data_config(network))
    return Identity(hash_weights(network), _structure(network), transform, answers(network))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all that decides the outputs of a model."""
    return identity(model).digest


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's stored tensors: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def answers(model: nn.Module) -> tuple[float, ...]:
    """Outputs for two fixed images, projected to :data:`PROJECTED` numbers each, and rounded.

    Copies of the tensors run in double precision on the CPU, so that every processor comes to the
    same numbers, and routers to the same decisions; the model as it is where that cannot be.

    Raises MoeeError: no ``pretrained_cfg``; it cannot be run on images of its size, or be copied.
    """
    network = unwrapped(model)
    first = next(network.parameters())
    for device, dtype in ("cpu", torch.float64), (first.device, first.dtype):
        try:
            images = _images(input_size(network)).to(device, dtype)
            return _round(_run(network, images), exact=dtype == torch.float64)
        except DOES_NOT_FIT as error:
            refusal = misfit(network, error)
    raise refusal


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether answers are those of the same model, whatever the processor and the versions."""
    a, b = np.asarray(one), np.asarray(other)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= CLOSE * np.abs(a).max())


def copy_model(network: nn.Module) -> nn.Module:
    """Copy a model. Raises MoeeError: it holds what cannot be copied."""
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        found = str(error).splitlines()[0][:120]
        hint = "make what was put into it by hand permanent, as by torch.nn.utils.prune.remove"
        raise MoeeError("a model that can be copied", found, hint) from None


@torch.no_grad()
def _run(network: nn.Module, images: torch.Tensor) -> Any:
    for value in chain.from_iterable(vars(module).values() for module in network.modules()):
        # tensors beside parameters and buffers decide what it does, as those of an LSTM
        if any(map(torch.is_tensor, value if isinstance(value, list | tuple) else [value])):
            return copy_model(network).to(images.device, images.dtype).eval()(images)
    copies = {}  # to copy the modules too takes far longer
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        kind = images.dtype if tensor.is_floating_point() or tensor.is_complex() else None
        copies[name] = tensor.detach().to(images.device, kind, copy=True)
    with evaluating(network), restored(network.modules()):
        for own in map(vars, network.modules()):  # caches of this precision will be forgotten
            caches = {k for k, v in own.items() if isinstance(v, dict) and not k.endswith("hooks")}
            own.update({name: copy.copy(own[name]) for name in caches})
        return functional_call(network, copies, images)


def _round(outputs: Any, *, exact: bool) -> tuple[float, ...]:
    tensors = tree_leaves(outputs)
    if odd := [type(each).__name__ for each in tensors if not torch.is_tensor(each)]:
        raise TypeError(f"outputs that are {odd[0]}, not tensors")
    images = [tensor.reshape(len(tensor), -1).double().cpu() for tensor in tensors]
    flat = torch.cat(images, dim=1).numpy()
    flat = np.nan_to_num(flat, nan=0, posinf=INFINITE, neginf=-INFINITE)  # JSON knows no others
    directions = np.random.default_rng(len(flat[0])).standard_normal((len(flat[0]), PROJECTED))
    projected = (flat @ directions / math.sqrt(len(directions))).flatten()
    # Rounded to steps of the power of two above the largest.
    largest, steps = np.abs(projected).max(), EXACT if exact else ROUGH
    step = (2.0 ** math.ceil(math.log2(largest)) if largest else 1.0) / steps
    return tuple((np.round(projected / step) * step).tolist())


def _images(size: tuple[int, int, int]) -> torch.Tensor:
    """Two images [2, C, H, W], double: noise, and waves that differ from channel to channel."""
    channels, height, width = size
    noise = np.random.default_rng(0).standard_normal(size)
    y, x = np.mgrid[:height, :width]
    waves = [np.cos((c + 2) * x / width * math.pi + y / height * 5) for c in range(channels)]
    return torch.from_numpy(np.stack([noise, np.stack(waves)]))


def _structure(network: nn.Module) -> str:
    """Digest of what the probe may not reach: classes and settings of modules, names, labels."""
    modules = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Identity) or "Drop" in type(module).__name__:
            continue
        settings = {  # of plain values, which may change the outputs; the answers show all others
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
            and not key.startswith("_")
            and not any(part in key for part in IGNORED)
        }
        modules[name] = [type(module).__qualname__, module.extra_repr(), settings]
    return _digest([modules, {name: network.pretrained_cfg.get(name) for name in STATED}])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()
