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
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grouped_mm, linear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from moee_analysis.layers import MoeMlp
    from moee_analysis.layouts import Layout, Part

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
    if torch.compiler.is_compiling() or len(tokens) <= BLOCK:  # a trace fits any number of tokens
        return _masked(layer, tokens, chosen)
    blocks = zip(tokens.split(BLOCK), chosen.split(BLOCK), strict=True)
    return torch.cat([_masked(layer, x, experts) for x, experts in blocks])


def _masked(layer: MoeMlp, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    hidden = layer.act(layer.fc1(x))
    if layer.columns is not None:  # of every expert: it has output weights of its own
        hidden = hidden.index_select(1, layer.neurons)
    hidden = _only(hidden, _sums(layer.kept_by_expert.to(hidden.dtype), experts))
    if layer.shift is None:
        return layer.fc2(hidden)
    constant = layer.fc2.bias + _sums(layer.shift, experts)
    return torch.addmm(constant, hidden, layer.fc2.weight.T)


def _only(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Activations times what is ``kept``, in their own memory where nothing else needs them."""
    return hidden * kept if hidden.requires_grad else hidden.mul_(kept)


def _sums(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Sum of the ``rows`` (experts, any) that are ``chosen`` (n, k) by each token: (n, any)."""
    if chosen.shape[1] == 1:
        return rows.index_select(0, chosen[:, 0])
    return rows[chosen].sum(dim=1)


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
    """The MLP of a group of experts: its neurons one after the other in memory."""

    part: Part
    act: nn.Module
    W1: torch.Tensor
    b1: torch.Tensor | None
    outward: torch.Tensor  # W2^T
    constants: torch.Tensor  # of all experts, in the layout's order

    @classmethod
    def of(
        cls, layer: MoeMlp, part: Part, outward: torch.Tensor, constants: torch.Tensor
    ) -> _PartMlp:
        W1, b1 = layer.fc1.weight, layer.fc1.bias
        if part.neurons is not None:
            W1, outward = W1.index_select(0, part.neurons), outward.index_select(0, part.columns)
            b1 = None if b1 is None else b1.index_select(0, part.neurons)
        return cls(part, layer.act, W1, b1, outward, constants)

    def __call__(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Outputs (n, dim) for ``x`` (n, dim) of the experts at ``places`` of the layout."""
        hidden = self.act(linear(x, self.W1, self.b1))
        if self.part.kept is not None:
            own = self.part.kept.to(hidden.dtype).index_select(0, places - self.part.start)
            hidden = _only(hidden, own)
        if self.part.stop - self.part.start == 1:
            return torch.addmm(self.constants[self.part.start], hidden, self.outward)
        return torch.addmm(self.constants.index_select(0, places), hidden, self.outward)


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
    bias = layer.fc2.bias.expand(layer.n_experts, -1)
    shift = torch.zeros_like(bias) if layer.shift is None else layer.shift
    return shift + bias if per_token == 1 else shift
