"""Models: the bundled ones, any timm name, local checkpoints; and the MLPs inside them."""

from __future__ import annotations

import difflib
import hashlib
import json
import socket
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants as hub
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.mlp_survey import survey
from moee_analysis.paths import data_folder
from moee_analysis.weights import load_tensors, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moee_analysis.mlp_survey import SurveyedMlp

BUNDLED = "bundled"
BUNDLED_MODELS: dict[str, type[nn.Module]] = {
    BUNDLED: VisionTransformer,
    "bundled_swin": SwinTransformer,
    "bundled_convnext": ConvNeXt,
}
"""Names of the models in the data folder, and timm's class of each."""


@dataclass(frozen=True)
class MlpSite:
    """One Linear-activation-Linear MLP of a model.

    ``name`` is the module's name (``"blocks.0.mlp"``), ``index`` its place counted from 0,
    ``dim`` the width of its input, ``hidden`` its number of hidden neurons.
    """

    name: str
    index: int
    dim: int
    hidden: int

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module that stands at this site of ``model``."""
        return model.get_submodule(self.name)


def load_model(
    name: str = BUNDLED, *, weights: str | Path | None = None, device: str = "cpu"
) -> nn.Module:
    """Load a dense model, ready for evaluation.

    Parameters
    ----------
    name
        ``"bundled"`` (a small ViT trained on the rendered scenes), ``"bundled_swin"``,
        ``"bundled_convnext"``, or any name timm knows.
    weights
        A local ``.safetensors`` or ``.pth`` state dict; None takes the bundled weights, or
        timm's pretrained weights from the hub. Only tensors are ever read from a file.
    device
        Where the model goes.

    Raises
    ------
    MoeeError
        Unknown name; no weights to be had (offline); a file that is not a state dict of
        this model; a device that is not there.
    """
    check_device(device)
    if weights is not None:
        model = _with_local_weights(name, Path(weights))
    elif name in BUNDLED_MODELS:
        model = _with_local_weights(name, data_folder() / f"{name}.safetensors")
    else:
        model = _from_hub(name)
    return model.eval().requires_grad_(requires_grad=False).to(device)


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoeeError(
            "a device of this machine", f"'{device}' ({str(error).splitlines()[0][:80]})",
            "use cpu, or cuda where there is one",
        ) from None  # fmt: skip


def build_model(
    name: str, *, num_classes: int | None = None, pretrained_cfg: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the architecture ``name`` with random weights.

    ``num_classes`` and ``pretrained_cfg`` replace the architecture's own where given.
    """
    if name in BUNDLED_MODELS:
        model = _bundled_architecture(name)
    else:
        _check_name(name)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        model = timm.create_model(name, pretrained=False, **classes)
    model.pretrained_cfg = {**model.pretrained_cfg, **(pretrained_cfg or {})}
    return model.eval()


def find_mlps(model: nn.Module) -> list[MlpSite]:
    """Find every Linear-activation-Linear MLP (``timm.layers.Mlp``), in order, from 0.

    Those that :func:`survey` gives a reason against are left out.

    Raises
    ------
    MoeeError
        The model has none; the message lists the MLP-like modules that were found, and why they
        are left out.
    """
    surveyed = survey(model)
    names = [mlp.name for mlp in surveyed if mlp.convertible]
    if not names:
        raise MoeeError(
            "a model with Linear-activation-Linear MLPs (timm.layers.Mlp)",
            _only_others(surveyed, model),
            "choose a ViT, DeiT, Swin, ConvNeXt or another of docs/architectures.md; gated and "
            "convolutional MLPs cannot be taken apart",
        )
    return [_site(model, name, index) for index, name in enumerate(names)]


def model_transform(model: nn.Module) -> Callable:
    """Evaluation transform (PIL image -> float tensor) of the model's own ``pretrained_cfg``."""
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    return timm.data.create_transform(**settings, is_training=False)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of one input image."""
    return tuple(timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)["input_size"])


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classes in the order of its outputs; wnids for ImageNet.

    Raises
    ------
    MoeeError
        The model does not say which classes it knows.
    """
    own = model.pretrained_cfg.get("label_names")
    if own:
        return tuple(own)
    return tuple(_imagenet(model).label_names())


def class_labels(model: nn.Module) -> tuple[str, ...]:
    """Readable names of the model's classes, in the order of its outputs."""
    own = model.pretrained_cfg.get("label_names")
    if own:
        return tuple(name.replace("_", " ") for name in own)
    info = _imagenet(model)
    names = (info.index_to_description(i) for i in range(info.num_classes()))
    return tuple(name.split(",")[0] for name in names)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's weights: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def architecture(model: nn.Module) -> str:
    """Name under which :func:`build_model` builds this architecture.

    Raises
    ------
    MoeeError
        The model carries no ``pretrained_cfg`` with an architecture.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name:
        raise MoeeError(
            "a timm model whose pretrained_cfg names its architecture",
            f"a {type(model).__name__} without one",
            "load it with load_model, or make it with timm.create_model",
        )
    return name


def _site(model: nn.Module, name: str, index: int) -> MlpSite:
    mlp = model.get_submodule(name)
    return MlpSite(name, index, mlp.fc1.in_features, mlp.fc1.out_features)


def _only_others(surveyed: list[SurveyedMlp], model: nn.Module) -> str:
    """What there is instead of plain MLPs, and why it is none, as text."""
    kinds = Counter((mlp.kind, mlp.reason) for mlp in surveyed)
    if not kinds:
        return f"no MLP at all in {type(model).__name__}"
    listed = [f"{count} x {kind} ({reason})" for (kind, reason), count in kinds.most_common()]
    return f"only {', '.join(listed)} in {type(model).__name__}"


def _check_name(name: str) -> None:
    if timm.is_model(name):
        _check_tag(name)
        return
    if Path(name).suffix in {".safetensors", ".pth", ".pt"}:
        hint = f"pass the architecture as the name and the file as weights='{name}'"
    else:
        known = [*BUNDLED_MODELS, *timm.list_models()]
        close = difflib.get_close_matches(name.partition(".")[0], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
    expected = f"{', '.join(BUNDLED_MODELS)} or the name of a timm model"
    raise MoeeError(expected, f"'{name}'", hint.rstrip("."))


def _check_tag(name: str) -> None:
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tagged = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise MoeeError(
            "a pretrained tag that timm knows", f"'{name}'", f"choose {' or '.join(tagged[:3])}"
        ) from None


def _bundled_architecture(name: str) -> nn.Module:
    card = json.loads((data_folder() / f"{name}.json").read_text())
    model = BUNDLED_MODELS[name](**card["kwargs"])
    model.pretrained_cfg = card["pretrained_cfg"]
    return model


def _with_local_weights(name: str, path: Path) -> nn.Module:
    tensors, metadata = read_tensors(path)
    stored_cfg = _stored_cfg(metadata, path)
    model = build_model(name, pretrained_cfg=stored_cfg)
    head = _classifier(model, tensors)
    if head is not None and name not in BUNDLED_MODELS and head.shape[0] != model.num_classes:
        model = build_model(name, num_classes=head.shape[0], pretrained_cfg=stored_cfg)
    load_tensors(model, tensors, source=str(path))
    if name not in BUNDLED_MODELS or path.parent != data_folder():
        model.pretrained_cfg["file"] = str(path.resolve())
    return model


def _stored_cfg(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The ``pretrained_cfg`` in a file's metadata; empty where there is none."""
    text = metadata.get("pretrained_cfg", "{}")
    with suppress(ValueError):
        cfg = json.loads(text)
        if isinstance(cfg, dict):
            return cfg
    raise MoeeError(
        f"a JSON object under 'pretrained_cfg' in the metadata of '{path}'",
        f"'{text[:40]}'",
        "save the file again, with or without this entry",
    )


def _classifier(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The given weights of the model's (first) classifier."""
    names = model.pretrained_cfg.get("classifier")
    first = names[0] if isinstance(names, (list, tuple)) and names else names
    return tensors.get(f"{first}.weight")


def _from_hub(name: str) -> nn.Module:
    _check_name(name)
    try:
        with nullcontext() if _hub_answers() else _hub_offline():
            return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many unrelated types when offline
        raise MoeeError(
            f"pretrained weights of '{name}' from the hub",
            f"{type(error).__name__} (offline, or a model without pretrained weights)",
            "pass weights='path/to/file.safetensors', or use a bundled model",
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached; saves its client a minute of retries when it cannot."""
    if getproxies():
        return True
    try:
        socket.create_connection((urlsplit(hub.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Let the hub's client look in its cache only."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _imagenet(model: nn.Module) -> ImageNetInfo:
    subset = infer_imagenet_subset(model)
    if subset is None:
        raise MoeeError(
            "a model that says which classes it knows",
            f"{model.num_classes} classes without names in pretrained_cfg['label_names']",
            "set model.pretrained_cfg['label_names'] to the class names in output order",
        )
    return _imagenet_info(subset)


@cache
def _imagenet_info(subset: str) -> ImageNetInfo:
    """The classes of one of ImageNet's subsets; timm reads them from files each time."""
    return ImageNetInfo(subset)
