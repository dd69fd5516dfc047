"""What groups of experts on slots add to the tokens, such as core and universal experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.baselines.common.soft_moe_layer import SlotMlp
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.survey import survey
from moee_analysis.utils.progress import progress


def contributions(
    model: nn.Module, images: ImageSet, *, groups: Sequence[str] = ("core", "universal")
) -> pd.DataFrame:
    """What every group of experts adds to the tokens, layer by layer.

    The output of a layer for a token is the sum over all slots of the token's combine weight times
    what the slot's expert made. The part of that sum over the slots of one group is what the group
    adds; its ``contribution`` is the length (L2) of this part, mean over all tokens of all images.
    The paper of MoE Jetpack shows contributions without saying how they are computed: only their
    course over the layers compares with these.

    ``groups``: names of the groups, in the order of the layers'; of a layer with fewer, the first
      ones.

    One row for each layer of slots and ``group``: ``layer`` (place among the MLPs, from 0),
    ``experts``, ``hidden`` neurons of each; ``contribution``; ``relative``, the contribution over
    the mean length of the tokens' whole outputs of the layer; ``mass``, the share of the combine
    weights that the group's slots have.

    Raises MoeeError: a model without such layers, or a layer with more groups than names.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SlotMlp)}
    if not layers:
        raise MoeeError(
            "a model with experts on slots", "none", "convert it by jetpack or soft_moe"
        )
    most = max(len(layer.groups) for layer in layers.values())
    if most > len(groups):
        raise MoeeError(f"names of {most} groups of experts", str(list(groups)), "name them all")
    sums = {name: np.zeros((len(layer.groups) + 1, 3)) for name, layer in layers.items()}
    with ExitStack() as hooks, evaluating(model):
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(_add, sums[name])).remove)
        for x in progress(images.batches(model), label="contributions"):
            model(x.to(next(model.parameters())))
    places = _places(model, layers)
    rows = [row for name in layers for row in _rows(places[name], layers[name], sums[name], groups)]
    table = pd.DataFrame(rows)
    table.attrs["caption"] = f"{len(images)} images; mean over all tokens."
    return table


def _add(sums: np.ndarray, layer: SlotMlp, args: tuple[torch.Tensor], _: torch.Tensor) -> None:
    """Add lengths, combine weights and numbers of all tokens: of each group, then of the layer."""
    tokens = args[0].flatten(1, -2)
    mixing = layer.router(tokens)
    made = layer.slot_outputs(tokens, mixing).flatten(1, 2)
    slots = [layer.slots * group.n_experts for group in layer.groups]
    parts = zip(mixing.combine.split(slots, dim=2), made.split(slots, dim=1), strict=True)
    added = [(combine @ own, combine) for combine, own in parts]
    added.append((sum(each for each, _ in added), mixing.combine))
    for row, (each, combine) in zip(sums, added, strict=True):
        length = each.norm(dim=2).double().sum().item()
        np.add(row, (length, combine.double().sum().item(), tokens[..., 0].numel()), out=row)


def _rows(
    place: int, layer: SlotMlp, sums: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    *own, whole = sums
    for name, group, (length, mass, tokens) in zip(names, layer.groups, own, strict=False):
        yield {
            "layer": place,
            "group": name,
            "experts": group.n_experts,
            "hidden": group.hidden,
            "contribution": length / tokens,
            "relative": length / whole[0],
            "mass": mass / whole[1],
        }


def _places(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Place of every layer among all MLPs of the model, from 0."""
    mlps = {mlp.name for mlp in survey(model) if mlp.convertible} | set(layers)
    ordered = [name for name, _ in model.named_modules() if name in mlps]
    return {name: place for place, name in enumerate(ordered)}
