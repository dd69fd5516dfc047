"""The images a model takes: how many channels, which size, and how a picture is prepared for it."""

from functools import partial
from itertools import cycle, islice
from statistics import fmean
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import nn
from torchvision.transforms import Compose, Normalize

from moee_analysis.errors import MoeeError
from moee_analysis.models.unwrapping import inside, stated_modules

RGB = 3
MAKE_IT = "load it with load_model, or make it with timm.create_model"
DOES_NOT_FIT = (RuntimeError, TypeError, AssertionError, ValueError)  # images of another size


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of one input image, as ``model`` was built.

    Those of ``pretrained_cfg``, unless its patch embedding and first convolution say otherwise.
    """
    network = inside(model)
    channels, height, width = _config(network)["input_size"]
    first = next(iter(stated_modules(network, "first_conv").values()), None)
    if isinstance(first, nn.Conv2d):
        channels = first.in_channels
    embedding = getattr(network, "patch_embed", None)
    built, cfg = getattr(embedding, "img_size", None), network.pretrained_cfg
    if built and (getattr(embedding, "strict_img_size", False) or cfg.get("fixed_input_size")):
        height, width = built
    return channels, height, width


def data_config(model: nn.Module) -> dict[str, Any]:
    """How pictures are prepared for ``model``, by timm's names: size, interpolation, mean, ..."""
    size, config = input_size(model), _config(inside(model))
    of_channels = {name: _repeat(config[name], size[0]) for name in ("mean", "std")}
    return config | of_channels | {"input_size": size}


def model_transform(model: nn.Module) -> Compose:
    """Evaluation transform (PIL image -> float tensor) of the model's own ``pretrained_cfg``."""
    return transform_of(data_config(model))


def transform_of(config: dict[str, Any], **training: Any) -> Compose:
    """Transform of a :func:`data_config`; with the settings of ``training`` one for training.

    One channel is the luminance; else red, green and blue come in turn, as timm repeats weights.
    """
    channels = config["input_size"][0]
    of_picture = {name: _repeat(config[name], RGB) for name in ("mean", "std")}
    transform = timm.data.create_transform(
        **config | of_picture, is_training=bool(training), **training
    )
    if channels != RGB:
        steps = transform.transforms
        (place,) = (i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        to_tensor = partial(_to_channels, channels=channels)
        steps[place : place + 2] = [to_tensor, Normalize(config["mean"], config["std"])]
    return transform


def like(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Images ``x`` where the parameters of ``model`` are, and in their precision."""
    return x.to(next(model.parameters()))


def blank(model: nn.Module) -> torch.Tensor:
    """Zeros [1, C, H, W] of the precision and on the device of ``model``, and of its size."""
    return like(torch.zeros(1, *input_size(model)), model)


def misfit(model: nn.Module, error: Exception) -> MoeeError:
    """Say that ``model`` cannot be run on images of the size that it states."""
    reason = str(error).splitlines()[0][:120].rstrip(".") if str(error) else type(error).__name__
    expected = f"a model that takes images of {' x '.join(map(str, input_size(model)))}"
    hint = "build it for a size that it takes (--img-size, --in-chans, or the arguments of "
    hint += "timm.create_model), or state that in pretrained_cfg['input_size']"
    return MoeeError(expected, reason, hint)


def _to_channels(picture: Image.Image, channels: int) -> torch.Tensor:
    """Float tensor of so many channels, values from 0 to 1."""
    if channels == 1:
        return MaybeToTensor()(picture.convert("L"))
    return MaybeToTensor()(picture.convert("RGB"))[list(islice(cycle(range(RGB)), channels))]


def _config(network: nn.Module) -> dict[str, Any]:
    if not getattr(network, "pretrained_cfg", None):
        expected = "a timm model whose pretrained_cfg says which images it takes"
        raise MoeeError(expected, f"a {type(network).__name__} without one", MAKE_IT)
    return timm.data.resolve_model_data_config(network)


def _repeat(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or deviations of so many channels: the mean of all for one, else in turn."""
    if len(values) == channels:
        return tuple(values)
    return (fmean(values),) if channels == 1 else tuple(islice(cycle(values), channels))
