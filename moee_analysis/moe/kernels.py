"""Strategies to compute the experts of a layer: they differ in speed and agree in the outputs.

Each takes a `MoeMlp`, tokens (n, dim) and the experts chosen for them, int64 (n, k), and gives the
outputs (n, dim).

- ``masked``: all stored neurons for all tokens, then zeros where a token's experts lack them.
- ``sorted``: tokens sorted by expert once, then contiguous products, a group of experts at a time.
- ``grouped_mm``: the same groups in two calls of ``torch.nn.functional.grouped_mm``, which does
  not wait to know how many tokens each one gets; for GPUs.

Single experts compute nothing in vain, in many small products; all at once compute every stored
neuron for every token. Groups lie between: all neurons of the group for each of its tokens, then
zeros for those that the token's expert lacks. The more neurons they share, the less that costs.
"""

from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear, pad

from moee_analysis.models.capture import is_traced

BLOCK = 1024  # tokens whose hidden activations stay in the cache of a CPU
ALIGNED = 16  # neurons: torch's grouped products want rows of whole 16 bytes


@dataclass(frozen=True)
class Strategy:
    """One of :data:`STRATEGIES`, with so many ``groups`` of experts; None: each by itself."""

    name: str
    groups: int | None = None

    def __str__(self) -> str:
        return self.name if self.groups is None else f"{self.name}, {self.groups} groups"


@dataclass(frozen=True)
class ExpertGroups:
    """A layer's experts in groups; a place is that of an expert with one group after the other.

    ``order`` (experts,) are the experts by place, ``place`` (experts,) their places, ``group``
    (experts,) the groups by place, ``stops`` (groups,) the places where groups end. ``neurons``
    (groups, width) are those that any expert of the group keeps, so many as ``widths``, then
    others; ``kept`` (experts, width) by place is 1 for those of the expert; in a ``uniform`` group
    for all.
    """

    order: torch.Tensor
    place: torch.Tensor
    group: torch.Tensor
    stops: torch.Tensor
    neurons: torch.Tensor
    kept: torch.Tensor
    widths: list[int]
    uniform: list[bool]


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

    They stay together off the CPU, and in a trace, which has to fit any number of tokens.
    """
    if is_traced() or tokens.device.type != "cpu" or len(tokens) <= BLOCK:
        return (tokens,)
    return tokens.split(BLOCK)


def _masked(layer: nn.Module, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    hidden = layer.act(linear(x, layer.fc1.weight, layer.fc1.bias))
    if chosen.shape[1] > 1:
        ones = torch.ones_like(chosen, dtype=hidden.dtype)
        uses = hidden.new_zeros(len(x), len(layer.mask)).scatter_add(1, chosen, ones)
        hidden = hidden * (uses @ layer.mask)  # how many of the token's experts keep the neuron
    elif not layer.uniform:
        hidden = _drop(hidden, layer.mask.index_select(0, chosen[:, 0]))
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


def group_experts(kept: torch.Tensor, shares: torch.Tensor, count: int | None) -> ExpertGroups:
    """Put experts into ``count`` groups at most; None: every expert by itself.

    ``kept`` (experts, hidden) is 1 for an expert's neurons, ``shares`` (experts,) of the tokens.
    """
    table = (kept > 0).cpu().numpy()
    members = join_experts(table, shares.double().cpu().numpy(), count or len(table))
    with torch.inference_mode(mode=False):  # what inference has made serves training too
        order = torch.tensor([*chain(*members)], device=kept.device)
        sizes = torch.tensor([*map(len, members)], device=kept.device)
        group = torch.arange(len(sizes), device=kept.device).repeat_interleave(sizes)
        union = kept.new_zeros(len(sizes), kept.shape[1]).index_add(0, group, kept[order]) > 0
        widths, own = union.sum(dim=1), (kept[order] > 0).sum(dim=1)
        neurons = union.int().argsort(dim=1, descending=True, stable=True)[:, : widths.max()]
        lacking = kept.new_zeros(len(sizes)).index_add(0, group, (widths[group] - own).to(kept))
        filling = 0, -neurons.shape[1] % ALIGNED
        return ExpertGroups(
            order, order.argsort(), group, sizes.cumsum(0), pad(neurons, filling),
            pad(kept[order].gather(1, neurons[group]), filling), widths.tolist(),
            (lacking == 0).tolist(),
        )  # fmt: skip


def join_experts(kept: np.ndarray, shares: np.ndarray, count: int) -> list[list[int]]:
    """Join experts until there are ``count`` groups, always the two that cost least to join.

    A token costs all neurons of its group. Experts of the same neurons share one in any case.
    """
    alike: dict[bytes, list[int]] = {}
    for expert, row in enumerate(kept):
        alike.setdefault(row.tobytes(), []).append(expert)
    groups = list(alike.values())
    union = np.stack([kept[members[0]] for members in groups])
    share = np.array([shares[members].sum() for members in groups])
    while len(groups) > count:
        # neurons per token that joining two groups adds, (groups, groups)
        size, table = union.sum(axis=1), union.astype(np.float32)
        both, apart = size[:, None] + size - table @ table.T, share * size
        cost = (share[:, None] + share) * both - apart - apart[:, None]
        np.fill_diagonal(cost, np.inf)
        first, second = sorted(divmod(int(cost.argmin()), len(groups)))
        groups[first] += groups.pop(second)
        union[first] |= union[second]
        share[first] += share[second]
        union, share = np.delete(union, second, axis=0), np.delete(share, second)
    return groups
