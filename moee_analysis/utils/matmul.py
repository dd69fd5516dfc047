"""Products of tokens and weights: by torch's BLAS or by oneDNN, which some CPUs are faster with.

torch's wheels for x86 multiply in single precision with MKL, which leaves half of the vector width
of some processors unused. They have oneDNN too, which does not: torch.compile calls it for frozen
weights, by the operations that are called here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

KERNELS = {"blas": "BLAS", "onednn": "oneDNN"}
STEP = 32  # oneDNN compiles every shape of a product that it meets, and remembers some 1000
CLEARLY = 1.1  # times as fast that oneDNN has to be
ROUNDS = 10


@dataclass(frozen=True)
class Product:
    """Tokens times a ``weight`` (out, in), as in a Linear, by one of :data:`KERNELS`."""

    weight: torch.Tensor
    kernel: str = "blas"

    @classmethod
    def of(cls, weight: torch.Tensor, kernel: str, *, packed: bool) -> Product:
        """Prepare a product; ``packed`` takes a copy of the weight, and time that later calls save.

        oneDNN wants a weight of its own order, which is made in every call otherwise.
        """
        if kernel == "blas" or not weight.numel():
            return cls(weight)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), STEP)
        return cls(weight, kernel)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` (n, in) times the weight, plus ``bias`` (out,): (n, out)."""
        if self.kernel == "blas":
            return linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, bias, "none", [], "")

    def activated(self, x: torch.Tensor, bias: torch.Tensor | None, act: nn.Module) -> torch.Tensor:
        """``act`` of what the call gives; in one pass over it, where oneDNN knows ``act``."""
        if self.kernel == "onednn" and type(act) is nn.GELU:
            fused = "gelu", [], act.approximate
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, bias, *fused)
        return act(self(x, bias))

    def onto(self, to: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``to`` (n, out) plus ``x`` times the weight, in the memory of ``to`` where it may be."""
        if self.kernel == "onednn":
            return to.add_(self(x))
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return torch.addmm(to, x, self.weight.T)
        return to.addmm_(x, self.weight.T)


def is_traced() -> bool:
    """Whether a trace is made, by ``torch.compile``, ``torch.export`` or ``torch.jit.trace``.

    It has to fit any number of tokens, so nothing may depend on how many there are.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def fastest_kernel(x: torch.Tensor) -> str:
    """The faster one of :data:`KERNELS` that can be used for tokens like ``x``."""
    if not onednn_takes(x) or onednn_speed(torch.get_num_threads()) < CLEARLY:
        return "blas"
    return "onednn"


def onednn_takes(x: torch.Tensor) -> bool:
    """Whether oneDNN's products can stand in for torch's own with tokens like ``x``.

    They know no gradients, no automatic precision and no trace, and whoever watches torch's
    operations, to count them perhaps, does not know them.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
        and not is_in_torch_dispatch_mode()
        and torch.backends.mkldnn.enabled
        and _onednn_runs()
    )


@cache
def onednn_speed(threads: int) -> float:
    """How many times as fast as BLAS oneDNN is here, measured once for so many ``threads``."""
    x, weight = torch.ones(512, 256), torch.ones(512, 256)
    products = {kernel: Product.of(weight, kernel, packed=True) for kernel in KERNELS}
    seconds = dict.fromkeys(KERNELS, float("inf"))
    for _ in range(ROUNDS):
        for kernel, product in products.items():
            start = time.perf_counter()
            product(x)
            seconds[kernel] = min(seconds[kernel], time.perf_counter() - start)
    return seconds["blas"] / seconds["onednn"]


@cache
def _onednn_runs() -> bool:
    """Whether this torch has the operations, and they do what they have to on this processor."""
    x, weight = torch.arange(6.0).reshape(2, 3), torch.ones(4, 3)
    try:
        found = [Product.of(weight, "onednn", packed=packed)(x) for packed in (False, True)]
    except (AttributeError, RuntimeError):
        return False
    return all(torch.equal(each, x @ weight.T) for each in found)
