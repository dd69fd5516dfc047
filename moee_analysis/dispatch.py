"""Ways to compute a layer of experts: they differ in speed and agree in what they compute.

Each takes a layer, its tokens (n, dim) and the experts chosen for each, int64 (n, k), and gives
the outputs (n, dim). None of them works token by token.

- ``masked``: all stored neurons for all tokens, then zeros where a token's experts lack them.
- ``sorted``: tokens sorted by expert once, then contiguous products, a group of experts at a time.
- ``grouped_mm``: the same groups in two calls of ``torch.nn.functional.grouped_mm``, which does
  not wait to know how many tokens each one gets; for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grouped_mm, linear

from moee_analysis.layouts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from moee_analysis.layers import MoeMlp
    from moee_analysis.layouts import Layout

WAYS = ("masked", "sorted", "grouped_mm")
BLOCK = 1024  # tokens whose hidden activations stay in the cache

Block = tuple[torch.Tensor, torch.Tensor]  # pairs of a token and an expert: which, and their places


@dataclass(frozen=True)
class Way:
    """One of :data:`WAYS`, with so many ``groups`` of experts; None: every expert by itself."""

    name: str
    groups: int | None = None

    def __str__(self) -> str:
        return self.name if self.groups is None else f"{self.name}, {self.groups} groups"

    def __call__(self, layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Compute the layer's outputs (n, dim) for ``tokens`` (n, dim)."""
        if self.name == "masked" or not len(tokens) or not layer.fc1.out_features:
            return masked(layer, tokens, chosen)
        compute = in_groups if self.name == "sorted" else by_grouped_mm
        pairs = compute(layer, tokens, chosen, layer.layout(self.groups))
        per_token = chosen.shape[1]
        if per_token == 1:
            return pairs
        return pairs.unflatten(0, (-1, per_token)).sum(dim=1) + layer.fc2.bias


def masked(layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Compute all stored neurons for all tokens, and drop what a token's experts lack."""
    if chosen.shape[1] == 1 and layer.columns is None:
        compute, experts = _whole(layer), chosen[:, 0]
    else:
        compute, experts = partial(_summed, layer), chosen
    if torch.compiler.is_compiling() or len(tokens) <= BLOCK:  # a trace fits any number of tokens
        return compute(tokens, experts)
    blocks = zip(tokens.split(BLOCK), experts.split(BLOCK), strict=True)
    return torch.cat([compute(*block) for block in blocks])


def _whole(layer: MoeMlp) -> _PartMlp:
    """All experts as one group, in their own order."""
    part = Part(0, layer.n_experts, None, None, layer.lacking)
    return _PartMlp.of(layer, part, layer.fc2.weight.T, _constants(layer, per_token=1))


def _summed(layer: MoeMlp, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Outputs for ``x`` (n, dim) of several experts each, or of such with a W2 of their own."""
    hidden = layer.act(layer.fc1(x))
    if layer.columns is not None:
        hidden = hidden.index_select(1, layer.neurons)
    hidden = hidden * (layer.lacking == 0).to(hidden.dtype)[chosen].sum(dim=1)
    constant = layer.fc2.bias
    if layer.shift is not None:
        constant = constant + layer.shift[chosen].sum(dim=1)
    return torch.addmm(constant, hidden, layer.fc2.weight.T)


def in_groups(
    layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Outputs (n k, dim) of pairs of a token and an expert, one group of experts at a time."""
    per_token, out = chosen.shape[1], None
    constants = _constants(layer, per_token).index_select(0, layout.order)
    outward = layer.fc2.weight.T.contiguous()
    for part, blocks in _met(layout, chosen):
        mlp = _PartMlp.of(layer, part, outward, constants)
        for pairs, places in blocks:
            x = tokens.index_select(0, pairs if per_token == 1 else pairs // per_token)
            y = mlp(x, places)
            out = y.new_empty(chosen.numel(), y.shape[1]) if out is None else out
            out.index_copy_(0, pairs, y)
    return out


def _met(layout: Layout, chosen: torch.Tensor) -> Iterator[tuple[Part, Iterator[Block]]]:
    """Yield the groups that get any tokens, each with the blocks of its pairs, sorted by expert."""
    places, pairs = layout.place[chosen.flatten()].sort()
    stops = [*places.bincount(minlength=len(layout.place)).cumsum(0).tolist(), 0]
    for part in layout.parts:
        met = slice(stops[part.start - 1], stops[part.stop - 1])
        if met.start < met.stop:
            yield part, zip(pairs[met].split(BLOCK), places[met].split(BLOCK), strict=True)


@dataclass(frozen=True)
class _PartMlp:
    """The MLP of a group of experts: its neurons one after the other in memory.

    ``biases`` (experts, neurons) are b1 for the neurons that an expert keeps, and far below zero
    for those it lacks, which makes them silent without a pass of its own over the activations;
    None: nothing is lacking, or what is far below zero activates something.
    """

    part: Part
    act: nn.Module
    W1: torch.Tensor
    b1: torch.Tensor | None
    outward: torch.Tensor  # W2^T
    constants: torch.Tensor  # of all experts, in the layout's order
    biases: torch.Tensor | None

    @classmethod
    def of(
        cls, layer: MoeMlp, part: Part, outward: torch.Tensor, constants: torch.Tensor
    ) -> _PartMlp:
        W1, b1 = layer.fc1.weight, layer.fc1.bias
        if part.neurons is not None:
            W1, outward = W1.index_select(0, part.neurons), outward.index_select(0, part.columns)
            b1 = None if b1 is None else b1.index_select(0, part.neurons)
        biases = None
        if part.lacking is not None and layer.silent:
            biases = part.lacking if b1 is None else part.lacking + b1
        return cls(part, layer.act, W1, b1, outward, constants, biases)

    def __call__(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Outputs (n, dim) for ``x`` (n, dim) of the experts at ``places`` of the layout."""
        hidden = self._hidden(x, places - self.part.start if self.part.start else places)
        if self.part.stop - self.part.start == 1:
            return torch.addmm(self.constants[self.part.start], hidden, self.outward)
        return _added(self.constants.index_select(0, places), hidden, self.outward)

    def _hidden(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Activations (n, neurons), zeros where the ``experts`` of the group lack the neuron."""
        if self.biases is not None:
            return self.act(_added(self.biases.index_select(0, experts), x, self.W1.T))
        hidden = self.act(linear(x, self.W1, self.b1))
        if self.part.lacking is None:
            return hidden
        return hidden * (self.part.lacking == 0).index_select(0, experts)


def _added(to: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``to`` + ``x weight``, in the memory of ``to`` where neither autograd nor autocast minds."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.addmm(to, x, weight)
    return to.addmm_(x, weight)


def by_grouped_mm(
    layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Outputs (n k, dim) of pairs of a token and an expert, all groups of experts at once."""
    per_token, groups = chosen.shape[1], layout.padded
    places, pairs = layout.place[chosen.flatten()].sort()
    stops = torch.searchsorted(places, groups.stops).int()
    x = tokens.index_select(0, pairs // per_token)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    W1, out = layer.fc1.weight[groups.neurons].to(x.dtype), layer.fc2.weight.T[groups.columns]
    hidden = grouped_mm(x, W1.mT, offs=stops)
    if layer.fc1.bias is not None:
        bias = layer.fc1.bias[groups.neurons].to(x.dtype)
        hidden = hidden + bias.index_select(0, groups.group.index_select(0, places))
    hidden = layer.act(hidden) * groups.kept.to(x.dtype).index_select(0, places)
    y = grouped_mm(hidden, out.to(x.dtype), offs=stops)
    constants = _constants(layer, per_token).index_select(0, layout.order).to(x.dtype)
    return torch.empty_like(y).index_copy_(0, pairs, y + constants.index_select(0, places))


def _constants(layer: MoeMlp, per_token: int) -> torch.Tensor:
    """What each expert adds whatever its token is, (experts, dim); b2 too if it is the only one."""
    bias = layer.fc2.bias if per_token == 1 else torch.zeros_like(layer.fc2.bias)
    if layer.shift is None:
        return bias.expand(layer.n_experts, -1)
    return layer.shift + bias
