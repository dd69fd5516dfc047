"""Which model, batches, layers and classes a measure is asked about."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.class_names import plain_name
from moee_analysis.models.inputs import like
from moee_analysis.moe.layer import MoeMlp, moe_layers
from moee_analysis.utils.checks import layer_numbers
from moee_analysis.utils.progress import progress

Run = Extraction | nn.Module
"""A run, or a model, routed or not."""

Layers = Sequence[int]
"""Indices of MLPs, counted from 0; empty: all."""


def model_of(run: Run) -> nn.Module:
    """The routed model of an extraction; a model stands for itself."""
    return run if isinstance(run, nn.Module) else run.model


def decode_batches(
    model: nn.Module, images: ImageSet, batch_size: int | None = None, *, label: str
) -> Iterator[torch.Tensor]:
    """Yield ``images`` prepared for ``model``, on the CPU; ``label`` names the progress bar."""
    size = fitting_batch(model, batch_size)
    total = math.ceil(len(images) / size)
    return progress(images.batches(model, batch_size=size), label=label, total=total)


def batches_of(
    model: nn.Module, images: ImageSet, batch_size: int | None = None, *, label: str
) -> Iterator[torch.Tensor]:
    """Yield ``images`` as ``model`` takes them, where it is and in its precision."""
    return (like(x, model) for x in decode_batches(model, images, batch_size, label=label))


def check_any(images: ImageSet) -> None:
    """Refuse a set without images by a MoeeError."""
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")


def choose_layers(known: Iterable[int], wanted: Layers) -> list[int]:
    """The ``wanted`` layers in order, or all ``known``; a MoeeError names one that is not known."""
    layer_numbers(wanted)
    wanted, known = sorted(set(wanted or ())), sorted(known)
    if missing := [layer for layer in wanted if layer not in known]:
        expected = f"layers among {', '.join(map(str, known)) or 'none'} (those with experts)"
        hint = "layers are counted from 0; a layer left dense has no experts"
        raise MoeeError(expected, f"layer {missing[0]}", hint)
    return wanted or known


def choose_routed(run: Run, layers: Layers) -> dict[int, MoeMlp]:
    """Return the routed ones of the ``layers`` by index; a MoeeError says that there are none."""
    found = moe_layers(model_of(run))
    if not found:
        hint = "extract with another clustering, or see why layers stayed dense in run.layers"
        raise MoeeError("a model with experts", "only dense layers", hint)
    return {layer: found[layer] for layer in choose_layers(found, layers)}


def choose_classes(names: Mapping[int, str], wanted: Sequence[int | str]) -> list[int]:
    """Return class indices of ``wanted`` (names, written in any way, or indices), or all in order.

    A MoeeError names classes without images.
    """
    index = {plain_name(name): number for number, name in names.items()} | {n: n for n in names}
    asked = [plain_name(item) if isinstance(item, str) else item for item in wanted]
    missing = [str(item) for item, key in zip(wanted, asked, strict=True) if key not in index]
    if missing:
        expected = f"classes of the images (such as {', '.join(list(names.values())[:6])})"
        hint = "choose classes that the images have, or add images of them"
        raise MoeeError(expected, f"no image of {', '.join(missing[:3])}", hint)
    return [index[key] for key in asked] or sorted(names)


def families_of(names: Sequence[str], families: Mapping[str, str]) -> list[str]:
    """Return the family of every class of ``names``; a MoeeError names classes without one."""
    known = {plain_name(name): family for name, family in families.items()}
    if missing := [name for name in names if plain_name(name) not in known]:
        hint = "add it to families, or choose the classes that have one"
        raise MoeeError("a family of every class", f"none of {', '.join(missing[:3])}", hint)
    return [known[plain_name(name)] for name in names]
