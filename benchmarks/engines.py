"""What runs a model: torch as it is, its compiler, ONNX Runtime in two precisions, OpenVINO.

All but torch are optional. Each uses as many threads as torch has when it is opened.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from moee_analysis.models.capture import switched
from moee_analysis.models.exporting import Outputs, export_model, open_onnx

TORCH, COMPILED, INT8 = "torch", "torch.compile", "ONNX Runtime int8"


class Opened(nn.Module):
    """A model in another engine, with the same inputs and outputs."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs
        self.like = nn.Parameter(torch.empty(0), requires_grad=False)  # single precision, on a CPU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images to what the model makes of them."""
        return self.outputs(x)


@dataclass(frozen=True)
class Engine:
    """Opens a model, or the ONNX file of it, where the packages that it ``needs`` are installed."""

    open: Callable[[nn.Module, Path], nn.Module]
    needs: tuple[str, ...] | None = None  # None: no file, and nothing but torch


def _compiled(model: nn.Module, _: Path) -> nn.Module:
    torch.compiler.reset()  # what was compiled for other batches stays at its limit of variants
    return torch.compile(model, dynamic=False)


def _in_int8(_: nn.Module, file: Path) -> nn.Module:
    """Products with weights in int8, activations scaled anew for every batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_suffix(".int8.onnx")
    if not small.is_file():
        how = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
        with switched([logging.getLogger()], disabled=True):  # it advises to prepare the graph
            quantize_dynamic(file, small, per_channel=True, **how)
    return Opened(open_onnx(small))


def _in_openvino(_: nn.Module, file: Path) -> nn.Module:
    import openvino

    how = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    how |= {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(file, "CPU", how)
    return Opened(lambda x: torch.from_numpy(model(x.numpy())[0]))


_ONNX = ("onnx", "onnxscript", "onnxruntime")
ENGINES: dict[str, Engine] = {
    TORCH: Engine(lambda model, _: model),
    COMPILED: Engine(_compiled),
    "ONNX Runtime": Engine(lambda _, file: Opened(open_onnx(file)), _ONNX),
    INT8: Engine(_in_int8, _ONNX),
    "OpenVINO": Engine(_in_openvino, (*_ONNX, "openvino")),
}


def usable(names: Sequence[str], *, plain: bool) -> tuple[str, ...]:
    """Those of the engines that work here; ``plain``: single precision on a CPU, as files need."""
    return tuple(name for name in names if _works(name, plain=plain))


def _works(name: str, *, plain: bool) -> bool:
    needs = ENGINES[name].needs
    if needs is None:
        return name != COMPILED or _compiles()
    return plain and all(map(find_spec, needs))


@cache
def _compiles() -> bool:
    """Whether there is a compiler, and what it needs."""
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception:  # it fails in many ways
        return False
    return True


def write_file(model: nn.Module, images: torch.Tensor, file: Path, engines: Sequence[str]) -> None:
    """Write the ONNX ``file`` of a model, checked on ``images``, if one of the engines needs it."""
    if any(ENGINES[name].needs for name in engines):
        export_model(model, images, file, form="onnx")
