"""What groups of experts on slots add to the tokens, such as core and universal experts."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.baselines.common.soft_moe_layer import SlotMlp
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.inputs import batches_of
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.survey import survey

GROUPS = ("core", "universal")  # of experts in a layer; some layers have the first one alone


def contributions(model: nn.Module, images: ImageSet) -> pd.DataFrame:
    """What every group of experts adds to the tokens, layer by layer.

    The output of a layer for a token is the sum over all slots of the token's combine weight times
    what the slot's expert made; a group adds the part of its slots. The paper of MoE Jetpack does
    not say how it computes contributions: only their course over the layers compares with these.

    One row for each layer of slots and ``group`` (core | universal): ``layer`` (of MLPs, from 0),
    ``experts``, ``hidden`` neurons of each; ``contribution``, the length (L2) of what the group
    adds, mean over all tokens; ``relative``, over the mean length of the layer's whole outputs;
    ``mass``, the share of the combine weights that the group's slots have.
    Raises MoeeError: a model without such layers.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SlotMlp)}
    if not layers:
        hint = "convert it by jetpack or soft_moe"
        raise MoeeError("a model with experts on slots", "none", hint)
    sums = {name: np.zeros((len(layer.groups) + 1, 3)) for name, layer in layers.items()}
    with evaluating(model), watch(layers, lambda name, x: _add(sums[name], layers[name], x)):
        for x in batches_of(model, images, label="contributions"):
            model(x)
    # layers are counted among all MLPs, also those that have become layers of slots
    mlps = {mlp.name for mlp in survey(model) if mlp.convertible} | set(layers)
    ordered = [name for name, _ in model.named_modules() if name in mlps]
    rows = []
    for name, layer in layers.items():
        *parts, (whole, weights, _) = sums[name]
        for own, group, (length, mass, tokens) in zip(GROUPS, layer.groups, parts, strict=False):
            row = {"layer": ordered.index(name), "group": own, "experts": group.n_experts}
            row |= {"hidden": group.hidden, "contribution": length / tokens}
            rows.append(row | {"relative": length / whole, "mass": mass / weights})
    return add_caption(pd.DataFrame(rows), f"{len(images)} images; mean over all tokens.")


def _add(sums: np.ndarray, layer: SlotMlp, x: torch.Tensor) -> None:
    """Add lengths, combine weights and numbers of all tokens: of each group, then of the layer."""
    tokens = x.flatten(1, -2)
    mixing = layer.router(tokens)
    made = layer.slot_outputs(tokens, mixing).flatten(1, 2)
    slots = [layer.slots * group.n_experts for group in layer.groups]
    parts = zip(mixing.combine.split(slots, dim=2), made.split(slots, dim=1), strict=True)
    added = [(combine @ own, combine) for combine, own in parts]
    added.append((sum(each for each, _ in added), mixing.combine))
    for row, (each, combine) in enumerate(added):
        length, mass = each.norm(dim=2).double().sum(), combine.double().sum()
        sums[row] += float(length), float(mass), tokens[..., 0].numel()
