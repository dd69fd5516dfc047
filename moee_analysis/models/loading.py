"""Models: the bundled ones, any timm name, local checkpoints; and the MLPs inside them."""

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.class_names import (
    class_labels,
    class_names,
    name_classes,
    read_class_names,
)
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import MAKE_IT, blank, input_size, model_transform
from moee_analysis.models.survey import survey
from moee_analysis.models.unwrapping import inside, unwrapped
from moee_analysis.models.weights import count_classes_in, fit_weights, hub_access, read_tensors
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.environment import own_folder

__all__ = [
    "BUNDLED", "BUNDLED_MODELS", "MlpSite", "architecture", "blank", "build_model", "check_device",
    "class_labels", "class_names", "find_mlps", "fingerprint", "input_size", "load_model",
    "model_transform", "name_classes", "unwrapped",
]  # fmt: skip

BUNDLED = "bundled"
BUNDLED_MODELS: dict[str, type[nn.Module]] = {  # their names in the data folder, timm's classes
    BUNDLED: VisionTransformer,
    "bundled_swin": SwinTransformer,
    "bundled_convnext": ConvNeXt,
}
FACTORY = {  # arguments of timm.create_model that say where weights are, or are not of images
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "features_only",
}  # fmt: skip


@dataclass(frozen=True)
class MlpSite:
    """A Linear-activation-Linear MLP of a model: its module, number, width, hidden neurons."""

    name: str
    index: int
    dim: int
    hidden: int

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module that stands at this site of ``model``."""
        return model.get_submodule(self.name)


def load_model(
    name: str = BUNDLED,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    classes: str | Path | Sequence[str] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Load a dense model by one of :data:`BUNDLED_MODELS` or of timm's names, for evaluation.

    - ``weights``: a local ``.safetensors`` or a checkpoint of PyTorch's; None takes the bundled
      ones, or timm's pretrained ones from the hub. The head follows the weights; sizes and channels
      are resampled as timm does.
    - ``classes``: names of its classes in the order of its outputs, or a file of them (one name a
      line, or JSON); None: those it states itself.
    - ``arguments`` of ``timm.create_model``, such as ``img_size`` or ``global_pool``, which are
      saved with all that is made from the model. None leaves one out.

    Raises MoeeError: unknown name or argument; no weights to be had (offline); a file that is not
    a state dict of this model; a device that is not there; a number of names other than of outputs.
    """
    check_device(device)
    names = read_class_names(classes) if isinstance(classes, str | Path) else classes
    arguments = {key: value for key, value in arguments.items() if value is not None}
    _check_arguments(arguments)
    if weights is None and name in BUNDLED_MODELS:
        weights = own_folder("data") / f"{name}.safetensors"
    if weights is None:
        model = _from_hub(name, arguments)
    else:
        model = _with_local_weights(name, Path(weights), arguments)
    if names is not None:
        name_classes(model, names)
    return model.eval().requires_grad_(requires_grad=False).to(device)


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know, that is not here, or that holds no values."""
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
        found = "'meta', which has shapes and no values"
    # a torch that was built without CUDA raises an AssertionError
    except (RuntimeError, AssertionError) as error:
        found = f"'{device}' ({str(error).splitlines()[0][:80]})"
    raise MoeeError("a device of this machine", found, "use cpu, or cuda where there is one")


def build_model(
    name: str, *, pretrained_cfg: Mapping[str, Any] | None = None, **arguments: Any
) -> nn.Module:
    """Build the architecture ``name`` with random weights, and ``arguments`` of timm's.

    Entries of ``pretrained_cfg`` replace the architecture's own; there alone stands the image size
    of a model that takes any. A name or an argument that timm does not know is refused.
    """
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if name not in BUNDLED_MODELS:
        _check_name(name)
    _check_arguments(arguments)
    try:
        model = _create(name, arguments)
    except Exception as error:  # timm's models raise whatever nonsense leads to
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        given = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in arguments.items())
        expected = f"arguments that timm.create_model('{name}') takes"
        hint = "correct them, or leave them out"
        raise MoeeError(expected, f"{given} ({reason})", hint) from None
    cfg = {**model.pretrained_cfg, **(pretrained_cfg or {})}
    channels, *size = tuple(cfg.get("input_size") or (3, 224, 224))
    if "img_size" in arguments:
        size = to_2tuple(arguments["img_size"])
    cfg["input_size"] = (arguments.get("in_chans", channels), *size)
    model.pretrained_cfg = cfg
    model._model_args = arguments  # as timm's factory keeps them, and as it does before 1.0.31
    return model.eval()


def find_mlps(model: nn.Module) -> list[MlpSite]:
    """Find every Linear-activation-Linear MLP that :func:`survey` has no reason against, from 0.

    Raises MoeeError: none; the message lists what is like an MLP, and why that is left out.
    """
    model = unwrapped(model)
    surveyed = survey(model)
    names = [mlp.name for mlp in surveyed if mlp.convertible]
    if not names:
        counts = Counter(f"{mlp.kind} ({mlp.reason})" for mlp in surveyed).most_common()
        listed = ", ".join(f"{count} x {kind}" for kind, count in counts)
        raise MoeeError(
            "a model with Linear-activation-Linear MLPs (timm.layers.Mlp)",
            f"{f'only {listed}' if listed else 'no MLP at all'} in {type(model).__name__}",
            "choose a ViT, DeiT, Swin, ConvNeXt or another of docs/architectures.md; gated and "
            "convolutional MLPs cannot be taken apart",
        )
    layers = [(name, model.get_submodule(name).fc1) for name in names]
    return [MlpSite(n, i, fc1.in_features, fc1.out_features) for i, (n, fc1) in enumerate(layers)]


def architecture(model: nn.Module) -> str:
    """Name under which :func:`build_model` builds this architecture; its ``pretrained_cfg``'s."""
    model = inside(model)
    if name := (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        return name
    expected = "a timm model whose pretrained_cfg names its architecture"
    raise MoeeError(expected, f"a {type(model).__name__} without one", MAKE_IT)


def _check_name(name: str) -> None:
    base = name.partition(".")[0]
    if timm.is_model(name):
        with suppress(RuntimeError):
            timm.get_pretrained_cfg(name)
            return
        tagged = timm.list_models(f"{base}.*", pretrained=True)
        expected, hint = "a pretrained tag that timm knows", f"choose {' or '.join(tagged[:3])}"
    else:
        close = difflib.get_close_matches(base, [*BUNDLED_MODELS, *timm.list_models()], n=3)
        expected = f"{', '.join(BUNDLED_MODELS)} or the name of a timm model"
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        if Path(name).suffix in {".safetensors", ".pth", ".pt"}:
            hint = f"pass the architecture as the name and the file as weights='{name}'"
    raise MoeeError(expected, f"'{name}'", hint)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are not of the architecture; they may come from the file of a run."""
    if own := FACTORY & arguments.keys():
        hint = "leave them out; weights are a file's, weights=FILE (--weights FILE), or the hub's"
        raise MoeeError("arguments of the architecture", ", ".join(sorted(own)), hint)
    whole_number("in_chans", arguments.get("in_chans", 1))
    sides = to_2tuple(arguments.get("img_size", 1))
    if len(sides) != 2:
        raise MoeeError("img_size as one number or two", reprlib.repr(sides), "give pixels")
    for side in sides:
        whole_number("img_size", side)


def _create(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a model; one that takes images of any size gets no ``img_size``."""
    try:
        if name not in BUNDLED_MODELS:
            return timm.create_model(name, pretrained=pretrained, **arguments)
        card = json.loads((own_folder("data") / f"{name}.json").read_text())
        model = BUNDLED_MODELS[name](**{**card["kwargs"], **arguments})
        model.pretrained_cfg = card["pretrained_cfg"]
        return model
    except TypeError as error:
        if "img_size" not in arguments or "img_size" not in str(error):
            raise
    smaller = {key: value for key, value in arguments.items() if key != "img_size"}
    return _create(name, smaller, pretrained=pretrained)


def _with_local_weights(name: str, path: Path, arguments: dict[str, Any]) -> nn.Module:
    tensors, metadata = read_tensors(path)
    stored = _stored_cfg(metadata, path)
    size = stored.get("input_size")
    if size is not None:  # the images that the weights were trained on
        arguments = {"in_chans": size[0], "img_size": tuple(size[1:])} | arguments
    model = build_model(name, pretrained_cfg=stored, **arguments)
    if "num_classes" not in arguments:
        classes = count_classes_in(tensors, model, path)
        if classes != model.num_classes:
            model = build_model(name, pretrained_cfg=stored, num_classes=classes, **arguments)
    fit_weights(model, tensors, source=str(path))
    if name not in BUNDLED_MODELS or path.parent != own_folder("data"):
        model.pretrained_cfg["file"] = str(path.resolve())
    return model


def _stored_cfg(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The ``pretrained_cfg`` in a file's metadata; empty where there is none."""
    text = metadata.get("pretrained_cfg", "{}")
    with suppress(ValueError):
        cfg = json.loads(text)
        if isinstance(cfg, dict):
            return cfg
    expected = f"a JSON object under 'pretrained_cfg' in the metadata of '{path}'"
    raise MoeeError(expected, f"'{text[:40]}'", "save the file again, with or without this entry")


def _from_hub(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    model = build_model(name, **arguments)
    try:
        with hub_access():
            loaded = _create(name, arguments, pretrained=True)
    except Exception as error:  # the hub's client raises many unrelated types when offline
        found = f"{type(error).__name__} (offline, or a model without pretrained weights)"
        hint = "pass weights='path/to/file.safetensors' (--weights FILE), or use a bundled model"
        raise MoeeError(f"pretrained weights of '{name}' from the hub", found, hint) from None
    loaded.pretrained_cfg = model.pretrained_cfg
    loaded._model_args = model._model_args
    return loaded
