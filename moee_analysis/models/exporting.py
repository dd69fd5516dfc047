"""A model as one file for other programs: ONNX, or pt2 of PyTorch's own, for any number of images.

What a trace cannot hold is left out of it: routed layers compute all stored neurons for all tokens.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating, switched
from moee_analysis.utils.storage.files import new_file

Outputs = Callable[[torch.Tensor], torch.Tensor]  # of images (images, channels, height, width)

EXTRA = "moee-analysis[deploy]"
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}  # packages, by format
IMAGES = "images"  # what the input and its first dimension are called
LARGEST = 2 * 10**9  # bytes of weights: one file of ONNX holds no more
CLOSE = {torch.float32: 1e-3}  # differences that rounding makes, as shares of the outputs
HALF, MOST = 3e-2, 0.75  # those of half precision; the share of images that they hold for


def check_packages(form: str) -> None:
    """Refuse a format, ``onnx`` or ``pt2``, whose packages are not all installed."""
    if missing := [name for name in NEEDED[form] if find_spec(name) is None]:
        found = f"no {' and no '.join(missing)}"
        raise MoeeError(f"the packages for {form}", found, f"pip install '{EXTRA}'")


def export_model(model: nn.Module, images: torch.Tensor, out: Path, *, form: str) -> torch.Tensor:
    """Write ``model`` to the file ``out``, whole and checked, or not at all.

    Returns how far the file's outputs for the ``images`` (images, channels, height, width) are from
    the model's, as a share of these, (images,). A token that stands between two experts, or two
    tokens as near to merging, may go the other way in another engine, so most images must agree.

    Raises MoeeError: missing packages, a network that cannot be traced, other outputs.
    """
    check_packages(form)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if form == "onnx" and (size > LARGEST or images.dtype == torch.bfloat16):
        found = f"{size / 1e9:.1f} GB of {str(images.dtype).removeprefix('torch.')}"
        expected = "up to 2 GB of weights of single or half precision, as ONNX Runtime has them"
        raise MoeeError(expected, found, "take pt2")
    with new_file(out, wanted=size) as new:
        write, open_file = FORMATS[form]
        write(trace(model, images), new)
        far = _differences(model, open_file(new), images)
        limit = CLOSE.get(images.dtype, HALF)
        if not far.quantile(MOST) <= limit:  # nan neither
            found = f"differences of {far.median():.1e}, {far.max():.1e} at most"
            expected = f"a file with the model's outputs, to {limit:g} of their size"
            raise MoeeError(expected, found, "take the other format, or another torch")
    return far


def trace(model: nn.Module, images: torch.Tensor) -> ExportedProgram:
    """What ``model`` computes, for any number of images like these; refused where torch cannot."""
    shapes = ({0: Dim(IMAGES, min=1)},)
    two = torch.cat([images, images])[:2]  # one image alone would stay one
    try:
        with evaluating(model):
            return torch.export.export(model, (two,), dynamic_shapes=shapes)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        found = str(error).strip().split("\n", 1)[0][:120]
        expected, hint = f"a {type(model).__name__} that torch.export can trace", "export another"
        raise MoeeError(expected, found or type(error).__name__, hint) from error


def write_onnx(program: ExportedProgram, file: Path) -> None:
    """Write a traced model as ONNX, its weights in the same file."""
    names = {"input_names": [IMAGES], "output_names": ["outputs"]}
    shapes = ({0: Dim(IMAGES)},)  # for the name of the dimension
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")  # tells what it skips
    with switched([folding], disabled=True):
        written = torch.onnx.export(program, **names, dynamic_shapes=shapes, verbose=False)
    written.save(file, external_data=False)


def open_onnx(file: Path) -> Outputs:
    """Let ONNX Runtime compute a file, on the CPU, by as many threads as torch has now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    given = {"providers": ["CPUExecutionProvider"], "sess_options": options}
    session = onnxruntime.InferenceSession(file, **given)
    return lambda x: torch.from_numpy(session.run(None, {IMAGES: x.cpu().numpy()})[0])


def _write_pt2(program: ExportedProgram, file: Path) -> None:
    with file.open("wb") as opened:  # torch wants to see the ending in a name
        torch.export.save(program, opened)


def _open_pt2(file: Path) -> Outputs:
    with file.open("rb") as opened:
        return torch.export.load(opened).module()


FORMATS = {"onnx": (write_onnx, open_onnx), "pt2": (_write_pt2, _open_pt2)}


def _differences(model: nn.Module, outputs: Outputs, images: torch.Tensor) -> torch.Tensor:
    """How far ``outputs`` are from those of ``model``, as a share of these, float64 (images,)."""
    with evaluating(model):
        found = torch.cat([outputs(x) for x in (images[:1], images[1:]) if len(x)])
        found, wanted = (each.cpu().double().flatten(1) for each in (found, model(images)))
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)
