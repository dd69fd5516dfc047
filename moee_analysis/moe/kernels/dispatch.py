"""Strategies to compute the experts of a layer: they differ in speed and agree in the outputs.

Each takes a `MoeMlp`, whose neurons are stored once for all experts that keep them, tokens (n, dim)
and the experts chosen for them, int64 (n, k), and gives the outputs (n, dim). None of them works
token by token.

- ``masked``: all stored neurons for all tokens, then zeros where a token's experts lack them.
- ``sorted``: tokens sorted by expert once, then contiguous products, a group of experts at a time.
- ``grouped_mm``: the same groups in two calls of ``torch.nn.functional.grouped_mm``, which does
  not wait to know how many tokens each one gets; for GPUs.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear

from moee_analysis.models.capture import is_traced
from moee_analysis.moe.kernels.expert_groups import ExpertGroups

BLOCK = 1024  # tokens whose hidden activations stay in the cache of a CPU


@dataclass(frozen=True)
class Strategy:
    """One of :data:`STRATEGIES`, with so many ``groups`` of experts; None: each by itself."""

    name: str
    groups: int | None = None

    def __str__(self) -> str:
        return self.name if self.groups is None else f"{self.name}, {self.groups} groups"


def masked(layer: nn.Module, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Compute all stored neurons for all tokens, and drop those that a token's experts lack."""
    blocks = zip(in_blocks(tokens), in_blocks(chosen), strict=True)
    outputs = [_masked(layer, *block) for block in blocks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def sorted_by_group(
    layer: nn.Module, groups: ExpertGroups, tokens: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Compute one group of experts at a time, for the tokens that chose one of them."""
    places, pairs = groups.place[chosen.flatten()].sort()  # pairs of a token and an expert
    stops = torch.searchsorted(places, groups.stops).tolist()
    constants, w2, outputs = _constants(layer, groups, chosen), layer.fc2.weight.T.contiguous(), []
    for group, (start, stop) in enumerate(pairwise([0, *stops])):
        if start == stop:
            continue
        own = groups.neurons[group, : groups.widths[group]]
        w1, own_w2 = layer.fc1.weight.index_select(0, own), w2.index_select(0, own)
        b1 = None if layer.fc1.bias is None else layer.fc1.bias.index_select(0, own)
        for pair, place in zip(
            in_blocks(pairs[start:stop]), in_blocks(places[start:stop]), strict=True
        ):
            x = tokens.index_select(0, pair // chosen.shape[1])  # gather
            hidden = layer.act(linear(x, w1, b1))
            if not groups.uniform[group]:
                hidden = _drop(hidden, groups.kept[:, : len(own)].index_select(0, place))
            outputs.append(torch.addmm(constants.index_select(0, place), hidden, own_w2))
    return _scatter(torch.cat(outputs), pairs, chosen, layer.fc2.bias)


def by_grouped_mm(
    layer: nn.Module, groups: ExpertGroups, tokens: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Compute all groups of experts at once, each for the tokens that chose one of its experts."""
    places, pairs = groups.place[chosen.flatten()].sort()  # pairs of a token and an expert
    stops = torch.searchsorted(places, groups.stops).int()
    x = tokens.index_select(0, pairs // chosen.shape[1])  # gather
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    hidden = grouped_mm(x, layer.fc1.weight[groups.neurons].to(x.dtype).mT, offs=stops)
    if layer.fc1.bias is not None:
        b1 = layer.fc1.bias[groups.neurons].to(x.dtype)
        hidden = hidden + b1.index_select(0, groups.group.index_select(0, places))
    hidden = layer.act(hidden) * groups.kept.to(x.dtype).index_select(0, places)
    outputs = grouped_mm(hidden, layer.fc2.weight.T[groups.neurons].to(x.dtype), offs=stops)
    constants = _constants(layer, groups, chosen).to(x.dtype)
    return _scatter(outputs + constants.index_select(0, places), pairs, chosen, layer.fc2.bias)


IN_GROUPS = {"sorted": sorted_by_group, "grouped_mm": by_grouped_mm}
STRATEGIES = ("masked", *IN_GROUPS)


def in_blocks(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split ``tokens`` (n, ...) into so many at a time that their activations stay in the cache.

    They stay together where no cache is to be filled: off the CPU, and in a trace, which has to
    fit any number of tokens.
    """
    if is_traced() or tokens.device.type != "cpu" or len(tokens) <= BLOCK:
        return (tokens,)
    return tokens.split(BLOCK)


def _masked(layer: nn.Module, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    hidden = layer.act(linear(x, layer.fc1.weight, layer.fc1.bias))
    if chosen.shape[1] == 1:
        hidden = _drop(hidden, layer.mask.index_select(0, chosen[:, 0]))
    else:
        ones = torch.ones_like(chosen, dtype=hidden.dtype)
        uses = hidden.new_zeros(len(x), len(layer.mask)).scatter_add(1, chosen, ones)
        hidden = hidden * (uses @ layer.mask)  # how many of the token's experts keep the neuron
    constant = layer.fc2.bias
    if layer.shift is not None:
        constant = constant + layer.shift[chosen].sum(dim=1)
    return torch.addmm(constant, hidden, layer.fc2.weight.T)


def _drop(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    # in place, where no gradient needs what was there: the cache has no room for both
    return hidden * kept if torch.is_grad_enabled() else hidden.mul_(kept)


def _constants(layer: nn.Module, groups: ExpertGroups, chosen: torch.Tensor) -> torch.Tensor:
    """Outputs (experts, dim) by place that do not depend on the token.

    b2 is among them where a token has a single expert; else it would be added several times.
    """
    bias = layer.fc2.bias if chosen.shape[1] == 1 else torch.zeros_like(layer.fc2.bias)
    if layer.shift is None:
        return bias.expand(len(groups.order), -1)
    return (layer.shift + bias).index_select(0, groups.order)


def _scatter(
    outputs: torch.Tensor, pairs: torch.Tensor, chosen: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """Put the outputs of sorted ``pairs`` in the order of the tokens, and add up each token's."""
    numbers = torch.arange(len(pairs), device=pairs.device)
    outputs = outputs.index_select(0, torch.empty_like(pairs).scatter_(0, pairs, numbers))
    if chosen.shape[1] == 1:
        return outputs
    return outputs.unflatten(0, chosen.shape).sum(dim=1) + b2
